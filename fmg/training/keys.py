"""Log keys that several modules of a run share. Imports no torch."""

RAW, AVERAGED = "eval/", "eval_ema/"
"""Prefixes of what an evaluation measures of the weights, and of their moving average."""
SCORE_KEY, EMA_SCORE_KEY = f"{RAW}score", f"{AVERAGED}score"
"""The held-out score by which the best checkpoint is chosen, of the weights and of their moving average."""
