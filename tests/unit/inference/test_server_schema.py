"""The image server under requests that schemathesis makes up from its own schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="needs the packages of flow-map-grpo[server]")

from tests.support.image_service import Patterns, image_service, served

pytestmark = pytest.mark.slow


def test_made_up_requests_get_the_answers_that_the_schema_states(tmp_path: Path) -> None:
    """No server error, no undocumented status, no answer of another form, and nothing invalid that is accepted.

    What the schema allows may be refused: it cannot say that a prompt is blank, or which sizes the model has.
    """
    pytest.importorskip("schemathesis")
    with image_service(served(Patterns()), token="secret") as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
        options = ["--max-examples", "25", "--seed", "1", "--exclude-checks", "positive_data_acceptance"]
        done = subprocess.run(
            [*command, *options, "--header", "Authorization: Bearer secret", "--generation-database", "none"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stdout
    assert "Selected: 7/7" in done.stdout
