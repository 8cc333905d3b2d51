"""The pipeline class of this folder, a few-step flow map, imported from fmg. No other code is run."""

import importlib

try:
    FlowMapPipeline = importlib.import_module("fmg").FlowMapPipeline
except (ImportError, AttributeError) as error:
    raise ImportError(
        "This folder is a few-step flow map. Its pipeline is in the Python package flow-map-grpo (imported as fmg),"
        " which is not installed; the package called fmg on package indexes is a different one."
    ) from error
