"""Evaluation: targets on prompt sets, with intervals, paired when two targets are compared."""
