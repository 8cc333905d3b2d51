"""What this package adds to fmg: names and paths. Imports no torch."""

from __future__ import annotations

from fmg.registry import models

models.add(
    "auraflow",
    config="fmg_auraflow.configs:AuraFlowConfig",
    factory="fmg.models.published:PublishedSource",
    summary="A few-step student of AuraFlow in a diffusers folder, sampled by Euler steps",
)
