"""The distribution: its version, its name, and the command that installs it.

The import name and the command are `fmg`. The distribution is not: a package index has another project under that name.
"""

from __future__ import annotations

__version__ = "0.1.0"

DISTRIBUTION = "flow-map-grpo"


def install_line(extra: str = "") -> str:
    """The command that adds the packages of an extra (or the plain dependencies) to an installed `fmg`.

    pip matches the name to the installed distribution, wherever it came from, and only asks an index for the rest.
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {DISTRIBUTION}"
