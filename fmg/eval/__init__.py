"""Evaluation: targets on prompt sets, with intervals, paired when two targets are compared."""

from fmg.eval.evaluate import evaluate
from fmg.eval.intervals import bootstrap_mean
from fmg.eval.results import Difference, EvalReport, Metric, Result, TagResult

__all__ = ["Difference", "EvalReport", "Metric", "Result", "TagResult", "bootstrap_mean", "evaluate"]
