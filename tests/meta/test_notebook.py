"""The notebook runs from top to bottom with a small amount of work, and is committed with the outputs of a real run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"
MAX_BYTES = 1_000_000


def shown(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The kinds of output of each code cell."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted({o.output_type for o in cell.outputs if o.get("name") != "stderr"}) for cell in cells]


def test_the_notebook_has_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert sum(kind != [] for kind in shown(notebook)) >= 6
    assert not any("error" in kinds for kinds in shown(notebook))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = shown(notebook)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = "iterations, groups, held_out = 1, 2, 8"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shown(notebook) == committed
