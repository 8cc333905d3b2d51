"""A virtual environment with links to a few packages of this one and nothing else: no network, no copies."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

ARTIFACT = ("numpy", "onnxruntime", "tokenizers", "pillow")
"""What an artifact needs to be drawn."""
COMMAND_LINE = ("typer", "rich", "pydantic", "pydantic_core")
"""What the command line needs besides."""
_THEIRS = {
    "onnxruntime": ("flatbuffers", "protobuf"),
    # of huggingface_hub, which tokenizers requires
    "tokenizers": ("filelock",),
    "typer": ("annotated_doc", "shellingham", "click"),
    "rich": ("markdown_it_py", "mdurl", "pygments"),
    "pydantic": ("annotated_types", "typing_extensions", "typing_inspection"),
}
_NO_PACKAGE = frozenset({"__pycache__", "..", "bin"})


@dataclass(frozen=True)
class BareEnvironment:
    """A virtual environment; `fmg` itself comes from the source tree."""

    python: Path

    @classmethod
    def make(cls, folder: Path, packages: Sequence[str]) -> BareEnvironment:
        venv.create(folder, with_pip=False, symlinks=True)
        python = folder / "bin" / "python"
        where = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        site = Path(where.decode().strip())
        for name in (*packages, *(needed for package in packages for needed in _THEIRS.get(package, ()))):
            _link(name, site)
        return cls(python)

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
        } | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [str(self.python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )


def _link(name: str, site: Path) -> None:
    found = distribution(name)
    for top in {Path(file).parts[0] for file in found.files or ()} - _NO_PACKAGE:
        source, target = Path(str(found.locate_file(top))), site / top
        if source.exists() and not target.exists():
            target.symlink_to(source.resolve())
