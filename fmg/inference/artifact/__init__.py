"""An exported model on disk: graphs, weights, tokenizers and a manifest that says how to sample them.

Imports the standard library only, so that an artifact opens where there is neither torch nor pydantic.
"""

from fmg.inference.artifact.layout import Artifact, is_artifact, open_artifact
from fmg.inference.artifact.manifest import Manifest

__all__ = ["Artifact", "Manifest", "is_artifact", "open_artifact"]
