"""Runs that are killed at random moments and resumed end like an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kills.py"


def test_twenty_kills_change_nothing() -> None:
    kills = os.environ.get("FMG_KILLS", "20")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", kills],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == int(kills)
    assert counts["resumed"] > 0
    assert counts["compared"] > 0
