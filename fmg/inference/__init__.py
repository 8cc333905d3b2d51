"""Drawing images from a model, a run or an artifact, with the same seeds on every backend."""

from fmg.inference.generator import Generated, Generator
from fmg.inference.target import Target, load, resolve_target

__all__ = ["Generated", "Generator", "Target", "load", "resolve_target"]
