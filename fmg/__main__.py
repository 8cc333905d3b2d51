"""`python -m fmg` is the `fmg` command."""

from __future__ import annotations

from fmg.cli.main import run

if __name__ == "__main__":
    run()
