"""The pipeline class of this folder, a few-step flow map. It is fmg's, and nothing else is run."""

import importlib

try:
    FlowMapPipeline = importlib.import_module("fmg").FlowMapPipeline
except (ImportError, AttributeError) as error:
    raise ImportError(
        "This folder is a few-step flow map. Its pipeline is in the Python package flow-map-grpo, which is imported as"
        " fmg and is not here; the package that indexes call fmg is another one."
    ) from error
