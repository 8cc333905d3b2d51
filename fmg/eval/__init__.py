"""Evaluation: targets on prompt sets, with intervals, paired when two targets are compared."""

from fmg.eval.evaluate import Difference, EvalReport, Result, evaluate
from fmg.eval.intervals import bootstrap_mean

__all__ = ["Difference", "EvalReport", "Result", "bootstrap_mean", "evaluate"]
