"""What this package adds to fmg: names and paths. Imports no torch."""

from __future__ import annotations

from fmg.registry import rewards, stochasticizers

rewards.add(
    "warmth",
    config="fmg_warmth.configs:WarmthConfig",
    factory="fmg_warmth.reward:Warmth",
    summary="Warm colours: red minus blue, on average over the picture",
)
stochasticizers.add(
    "asfmc-halfway",
    config="fmg_warmth.configs:HalfwayConfig",
    factory="fmg_warmth.stochasticizer:Halfway",
    summary="ASFMC with its anchor at a fraction of the target time, one half by default",
)
