"""The keys of a run's `metrics.jsonl`: training writes them; reports, diagnostics and `fmg runs` read them.

A line belongs to an iteration or to an evaluation. Its values are numbers; `<key>_se` is the standard error of `<key>`.
"""

from __future__ import annotations

import re

ITERATION = "iteration"
MEAN, ERROR, MAX = "_mean", "_se", "_max"
"""Suffixes: a mean over images, its standard error, and what processes reduce by the maximum."""

# rewards of an iteration
REWARD, REWARD_STD, REWARD_SE = "reward/mean", "reward/std", "reward/se"
REWARD_DROPPED = "reward/dropped"
"""Share of the images without a score; logged only if there are any."""
ZERO_STD_RATIO = "zero_std_ratio"
"""Share of the groups whose rewards are all equal, which teach nothing."""

# updates
LOSS, GRAD_NORM = "loss", "grad_norm"
LR = "lr"
"""The learning rate of an iteration's last update."""
APPROX_KL, KL_REF, CLIP_FRACTION = "approx_kl", "kl_ref", "clip_frac"
RATIO_MEAN, RATIO_MAX = "ratio_mean", "ratio_max"
MATCH = "match"
GRADIENT_REWARD, LAST_STEP_REWARD = "gradient_reward", "last_step_reward"
"""The mean reward of the images that a reward is differentiated at: of `reward-gradient`, and of a last step."""
L2_REF = "l2_ref"
OLD_DISTANCE, BASE_DISTANCE = "old_distance", "base_distance"
"""Mean squared distance of the predicted velocity from the old policy's and from the base's, on noised samples."""
SKIPPED_UPDATES = "skipped_updates"
ROLLOUT_NFE, TRAINED_ROWS = "nfe/rollout", "nfe/trained_rows"

# branched rollouts
COMPLETION_AGREEMENT = "branch/completion_agreement"
STEP_REWARD_STD, STEP_ZERO_STD_RATIO, STEP_GROUPS = (
    "branch/step_{}_reward_std",
    "branch/zero_std_ratio_{}",
    "branch/step_{}_groups",
)
"""For the groups that branch at one step, whose index goes into the braces."""

# evaluations
EVAL, EVAL_EMA = "eval/", "eval_ema/"
"""Prefixes of an evaluation's metrics: those of the weights, and those of their moving average."""
SCORE, EMA_SCORE = f"{EVAL}score", f"{EVAL_EMA}score"
"""The held-out score by which the best checkpoint is chosen, for the weights and for their moving average."""
DIVERSITY_WITHIN_GROUPS = "diversity/within_groups"

# the reward-hacking monitor
WATCH = "watch/"
TRAINED_GAIN = f"{WATCH}trained_gain"
DIVERSITY = "diversity"
"""The monitor's name for the diversity of samples, besides the names of rewards."""

# times in seconds
TIME, SECONDS = "time/", "_s"
TIME_ITERATION, TIME_EVAL = f"{TIME}iteration{SECONDS}", f"{TIME}eval{SECONDS}"

# of the summary of a run, not of a line
BEST_ITERATION, BEST_SCORE = "best/iteration", "best/score"


def error_of(key: str) -> str:
    """The key of a value's standard error: `eval/x_se` for `eval/x_mean`."""
    return key.removesuffix(MEAN) + ERROR


def reward_part(name: str) -> str:
    """The mean of one reward of a mixture over the images of a rollout."""
    return f"reward/{name.replace('/', '_')}{MEAN}"


def watched_loss(name: str) -> str:
    """How far a reward that is not trained, or `DIVERSITY`, fell."""
    return f"{WATCH}{name}_loss"


def watched_trained(name: str) -> str:
    """Change of the trained reward since the gap to this one opened."""
    return f"{WATCH}{name}_trained"


def time_of(stage: str) -> str:
    """The time of one stage of an iteration."""
    return f"{TIME}{stage}{SECONDS}"


def step_of(key: str, template: str) -> int | None:
    """The branching step that a key is about, by one of the templates `STEP_...`; None for other keys."""
    before, _, after = template.partition("{}")
    match = re.fullmatch(rf"{re.escape(before)}(\d+){re.escape(after)}", key)
    return None if match is None else int(match[1])
