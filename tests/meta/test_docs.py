"""Every command and program of the documentation runs; what they write goes to a temporary folder."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.artifact import traced_once
from tests.support.cli import fmg
from tests.support.docs import Command, NewFile, Program, Step, steps

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

# Enough to go through every line of code, and small enough to run on each change.
TINY = {
    "train": ["--iterations", "1", "--set", "rollout.groups=2", "--set", "rollout.group_size=4", "--set", "eval.num=8"],
    "eval": ["--num", "8"],
    "bench": ["--repeats", "1", "--num", "8"],
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # pages export the same model
    with traced_once(), session() as execute:
        for step in steps(page.read_text(encoding="utf-8")):
            run(step, page.name, execute)


@contextmanager
def session() -> Iterator[Callable[[str], object]]:
    """Runs the programs of a page in one process, as a reader would.

    It is not this process, because other tests must not see what a page registers. Its imports would take seconds, so
    it is forked from a process that has made them for all pages.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fmg.training.trainer", "fmg.models.flux.model", "matplotlib.backends.backend_agg"])
    with ProcessPoolExecutor(1, context) as pool:
        yield lambda source: pool.submit(execute_program, source, str(Path.cwd())).result()


def execute_program(source: str, folder: str) -> None:
    """Runs a program in a namespace of its own, with imports from the folder, as for a script there."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    exec(compile(source, "<page>", "exec"), {"__name__": "__main__"})


def run(step: Step, page: str, execute: Callable[[str], object]) -> None:
    if isinstance(step, NewFile):
        Path(step.name).write_text(step.content, encoding="utf-8")
    elif isinstance(step, Program):
        try:
            execute(step.source)
        except Exception as error:
            pytest.fail(f"{page}:{step.line}:\n{error.__cause__ or error}")
    elif step.words[0] == "fmg":
        shown = fmg(*shrunk(step))
        assert shown.code == 0, f"{page}:{step.line}: {' '.join(step.words)}\n{shown.stderr}"
    elif step.words[0] == "make":
        # running the target would run this test again, so only its existence is checked
        subprocess.run([*step.words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    else:
        pytest.fail(f"{page}:{step.line}: no way to try '{' '.join(step.words)}'; skip its block with a reason")


def shrunk(command: Command) -> tuple[str, ...]:
    """The command's arguments, reduced to a small amount of work; `--dry-run` and `--help` do none."""
    arguments = command.words[1:]
    if not arguments or {"--dry-run", "--help", "-h"} & set(arguments):
        return arguments
    return (*arguments, *TINY.get(arguments[0], ()))


def test_steps_of_a_page() -> None:
    page = """
```console
$ fmg list  # all of them
kind  name
$ fmg train \\
    --lr 1e-3
```
<!-- test: skip it takes an hour -->
```bash
make everything
```
<!-- test: with --num 1 -->

```bash
# a comment
fmg eval "my run"
make help
```
<!-- test: file recipe.yaml -->
```yaml
train: {seed: 1}
```
```python
x = 1
```
```
$ fmg never
```
"""
    assert list(steps(page)) == [
        Command(("fmg", "list"), 3),
        Command(("fmg", "train", "--lr", "1e-3"), 5),
        Command(("fmg", "eval", "my run", "--num", "1"), 16),
        Command(("make", "help"), 17),
        NewFile("recipe.yaml", "train: {seed: 1}\n"),
        Program("x = 1\n", 24),
    ]


def test_ten_lines_of_python_train_plot_generate_and_export() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    first = next(step for step in steps(page) if isinstance(step, Program))
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert len(lines) <= 10
    assert all(word in first.source for word in ("train(", ".plot()", ".generate(", "export_artifact("))


def test_decisions_are_numbered_once_and_listed() -> None:
    listed = re.findall(
        r"^- \[(\d+)\]\((0.+?\.md)\)", (ROOT / "docs" / "adr" / "README.md").read_text("utf-8"), re.MULTILINE
    )
    files = sorted(file.name for file in (ROOT / "docs" / "adr").glob("0*.md"))
    assert [name for _, name in listed] == files
    numbers = [int(number) for number, _ in listed]
    assert numbers == [int(name[:4]) for name in files]
    assert len(set(numbers)) == len(numbers)
