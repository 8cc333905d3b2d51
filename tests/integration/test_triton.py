"""`fmg export --triton` of the embedded model: the exported files alone give the images of `fmg generate`."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmg.inference.artifact import Artifact
from fmg.inference.onnxruntime import load
from fmg.inference.triton import TritonPythonModel
from tests.support.bare_environment import ROOT, BareEnvironment
from tests.support.cli import fmg
from tests.support.triton import triton_python_backend_utils as utils
from tests.support.triton.http import listening
from tests.support.triton.repository import read_configs

pytestmark = [pytest.mark.slow, pytest.mark.compile]

MODEL = "meanflow-shapes"
PROMPTS = [f"a {color} {shape}" for color in ("red", "blue", "green", "yellow") for shape in ("circle", "star")]
ROWS = [{"prompt": prompt, "seed": 100 + n} for n, prompt in enumerate(PROMPTS)]

SERVE = """
import json, sys
from pathlib import Path
import numpy as np
repository, standin, configs, rows = map(json.loads, sys.argv[1:])
sys.path.append(standin)
import triton_python_backend_utils as utils
server = utils.Server(Path(repository), configs)
model = server.load("meanflow-shapes")
asked = [rows[:1], rows[1:4], [{"prompt": "a", "steps": 0}], rows[4:]]
answers = model.execute([utils.asked(group) for group in asked])
assert [answer.has_error() for answer in answers] == [False, False, True, False], utils.Logger.lines
np.save("made.npy", np.concatenate([a.output_tensors()[0].as_numpy() for a in answers if not a.has_error()]))
assert ("meanflow-shapes_transformer", len(rows)) in server.calls
import fmg
assert Path(fmg.__file__).is_relative_to(repository), fmg.__file__
foreign = {"torch", "pydantic", "rich", "PIL"} & set(sys.modules)
assert not foreign, foreign
"""


@pytest.fixture(scope="module")
def repository(shapes_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    done = fmg("export", str(shapes_artifact.folder), "--triton", str(out), "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["triton"] == {
        "folder": str(out),
        "model": MODEL,
        "backends": {
            MODEL: "python",
            **{
                f"{MODEL}_{graph}": "onnxruntime"
                for graph in ("text_encoder", "text_encoder_2", "transformer", "vae_decoder")
            },
        },
        "max_batch": 64,
    }
    return out


def test_the_exported_files_generate_the_images_of_fmg(
    repository: Path, shapes_artifact: Artifact, tmp_path: Path
) -> None:
    environment = BareEnvironment.make(tmp_path / "venv", ("numpy", "onnxruntime", "tokenizers"))
    given = [str(repository), str(ROOT / "tests/support/triton"), read_configs(repository), ROWS]
    done = environment.run("-c", SERVE, *map(json.dumps, given), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with load(shapes_artifact) as generator:
        expected = generator.generate(PROMPTS, [100 + n for n in range(len(PROMPTS))]).image_array
    made = np.load(tmp_path / "made.npy").transpose(0, 3, 1, 2)
    assert float(np.abs(made / 255 - expected).max()) <= 1 / 255


def test_the_8_bit_transformer_and_the_client(
    shapes_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "models", tmp_path / "circle.png"
    artifact = str(shapes_artifact.folder)
    done = fmg("export", artifact, "--triton", str(out), "--int8", "--triton-name", "shapes")
    assert done.code == 0, done.stderr
    configs = read_configs(out)
    assert configs["shapes_transformer_int8"]["instance_group"][0]["kind"] == "KIND_CPU"
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    model = utils.Server(out, configs).started(TritonPythonModel(), "shapes")
    with listening(model, "shapes") as url:

        def client(*words: str) -> int:
            given = ["triton_client.py", *words, "--model", "shapes", "--url", url, "--out", str(picture)]
            monkeypatch.setattr(sys, "argv", given)
            with pytest.raises(SystemExit) as done:
                runpy.run_path(str(ROOT / "examples" / "triton_client.py"), run_name="__main__")
            assert isinstance(done.value.code, int)
            return done.value.code

        assert client("a red circle", "--steps", "99") == 1
        assert "99 steps are more than this model takes" in capsys.readouterr().err
        assert client("a red circle", "--seed", "7") == 0
        assert client("a red circle", "--seed", "7") == 2
    with load(artifact, int8=True) as generator:
        expected = generator.generate("a red circle", 7).image_array[0]
    made = np.asarray(Image.open(picture), np.float32).transpose(2, 0, 1)
    assert float(np.abs(made / 255 - expected).max()) <= 1 / 255
