"""The distribution: its version, its name, and the command that installs it.

The import name and the command are `fmg`. The distribution is not: a package index has another project under that name.
"""

from __future__ import annotations

from importlib.util import find_spec

__version__ = "0.1.0"

DISTRIBUTION = "flow-map-grpo"
RUNTIME = "flow-map-grpo-runtime"
"""The distribution that generates from artifacts and serves them: a part of the same modules, without torch."""

# what the runtime calls an extra of the full distribution; its dependencies include ONNX Runtime
_RUNTIME_EXTRAS = {"onnx": "", "server": "server"}


def is_runtime() -> bool:
    """Whether these are the modules of the runtime, and not of the full distribution."""
    return find_spec("fmg.training") is None


def install_line(extra: str = "") -> str:
    """The command that adds the packages of an extra (or the plain dependencies) to an installed `fmg`.

    pip matches the name to the installed distribution, wherever it came from, and only asks an index for the rest.
    """
    name = DISTRIBUTION
    if extra in _RUNTIME_EXTRAS and is_runtime():
        name, extra = RUNTIME, _RUNTIME_EXTRAS[extra]
    line = f"pip install '{name}[{extra}]'" if extra else f"pip install {name}"
    # the runtime's files are a part of those of the full distribution, which has to replace it
    return f"pip uninstall -y {RUNTIME} && {line}" if name == DISTRIBUTION and is_runtime() else line
