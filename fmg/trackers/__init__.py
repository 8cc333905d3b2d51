"""Experiment trackers. Each follows the `metrics.jsonl` of a run from a separate process. Imports no torch."""
