"""Experiment trackers. Each follows the `metrics.jsonl` of a run from a process of its own. Imports no torch."""
