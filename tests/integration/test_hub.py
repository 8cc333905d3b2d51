"""Runs on a stand-in for the model hub: what leaves, what comes back, and what is said when it fails."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import fmg as api
from fmg.core.files import SUMS, digest
from fmg.data.checkpoints import CheckpointIndex, existing_index, write_index
from fmg.data.run_folder import RunFolder
from fmg.inference.artifact import Artifact
from fmg.inference.hub_target import hub_source
from fmg.recipe import Recipe
from tests.support.artifact import make_run, shapes_recipe
from tests.support.fake_hub import READ_ONLY, TOKEN, FakeHub, fails
from tests.support.hub_commands import LORA, PROMPT, fresh_cache, picture, refused, succeeds
from tests.support.schemas import check
from tests.support.web import Call, Handler

RUN_FILES = {
    ".gitattributes",
    "README.md",
    "SHA256SUMS",
    "before_after.png",
    "fmg_adapter.json",
    "peft/adapter_config.json",
    "peft/adapter_model.safetensors",
    LORA,
    "recipe.yaml",
    "samples.png",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of the embedded model, on prompts from a file."""
    folder = tmp_path_factory.mktemp("trained")
    prompts = folder / "our-secret-prompts.txt"
    prompts.write_text("a red circle on the left\na blue square on the right\n", encoding="utf-8")
    values = {"rollout.groups": 2, "rollout.group_size": 4, "eval.num": 4, "prompts": str(prompts)}
    api.train(Recipe.default("meanflow-shapes", iterations=1, **values), folder / "runs" / "first", progress=False)
    return folder / "runs" / "first"


def test_a_run_leaves_with_card_weights_recipe_and_images_and_nothing_else(hub: FakeHub, trained: Path) -> None:
    done = succeeds("push", str(trained), "me/shapes", "--json")
    said = json.loads(done.stdout)
    check(said, "push")
    repository = hub.repositories["me/shapes"]
    files = repository.files()
    assert set(files) == RUN_FILES
    assert {file["path"]: file["bytes"] for file in said["files"]} == {
        name: len(data) for name, data in files.items() if name != ".gitattributes"
    }
    assert (said["commit"], said["created"], said["changed"]) == (repository.branches["main"], True, True)
    assert said["url"] == f"{hub.url}/me/shapes"
    assert not repository.private
    facts = ModelCard(files["README.md"].decode()).data.to_dict()
    assert facts["library_name"] == "diffusers"
    assert facts["pipeline_tag"] == "text-to-image"
    assert facts["license"] == "apache-2.0"
    assert {"lora", "fmg"} <= set(facts["tags"])
    assert facts["widget"][0]["output"]["url"] in files
    card = files["README.md"].decode()
    assert 'fmg generate "PROMPT" --from me/shapes' in card
    assert 'pipe.load_lora_weights("me/shapes")' in card
    assert "](before_after.png)" in card
    assert "RUN" not in card.partition("## Use")[2].partition("## Recipe")[0].replace("--kohya RUN", "")


def test_nothing_that_leaves_names_this_computer_or_its_prompts(hub: FakeHub, trained: Path) -> None:
    done = succeeds("push", str(trained), "me/shapes")
    assert "our-secret-prompts.txt is sent as our-secret-prompts.txt" in done.stderr
    forbidden = {
        str(trained),
        str(trained.parent.parent),
        str(Path.home()) + "/",
        f"/{getpass.getuser()}/",
        str(Path.cwd()),
    }
    for name, data in hub.repositories["me/shapes"].files().items():
        for text in (*forbidden, "a blue square on the right"):
            assert text.encode() not in data, (name, text)


def test_a_dry_run_lists_the_same_files_and_contacts_nobody(
    hub: FakeHub, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = succeeds("push", str(trained), "me/shapes", "--dry-run", "--json", "--offline")
    planned = json.loads(done.stdout)
    check(planned, "push")
    assert hub.paths() == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sent = json.loads(succeeds("push", str(trained), "me/shapes", "--json").stdout)
    assert planned["files"] == sent["files"]
    assert planned["bytes"] == sum(file["bytes"] for file in sent["files"])
    text = succeeds("push", str(trained), "me/shapes", "--dry-run").stdout
    assert all(file["path"] in text for file in planned["files"])
    assert "Terms of the base: Apache-2.0" in text


def test_a_dry_run_starts_without_torch(trained: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from fmg.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit('imported torch' if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", script, "push", str(trained), "me/shapes", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_pushed_run_generates_the_same_image_elsewhere(
    hub: FakeHub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = picture(trained)
    commit = json.loads(succeeds("push", str(trained), "me/shapes", "--private", "--json").stdout)["commit"]
    fresh_cache(monkeypatch, hub, tmp_path / "other")
    assert "does not exist on the hub, or is private" in refused("generate", PROMPT, "--from", "me/shapes")
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    done = succeeds("generate", PROMPT, "--from", "me/shapes", "--device", "cpu", "--json")
    assert Path(json.loads(done.stdout)["images"][0]["path"]).read_bytes() == before
    assert f"me/shapes@{commit}" in done.stderr
    assert "me/shapes: fetching " in done.stderr
    assert not any("peft" in path for path in hub.paths("GET")), "twice the weights were fetched"

    def asked() -> list[str]:
        assert hub.server is not None
        seen, hub.server.calls[:] = hub.paths(), []
        return [path for path in seen if path.startswith(("/me/", "/api/models", "/store"))]

    asked()
    # later only the commit is asked for; a commit that is here needs nothing
    assert picture("hub:me/shapes") == before
    assert asked() == ["/me/shapes/resolve/main/SHA256SUMS"]
    assert picture(f"me/shapes@{commit}") == before
    assert picture("me/shapes", "--offline") == before
    assert asked() == []
    assert "no revision 'nowhere'" in refused("generate", PROMPT, "--from", "me/shapes@nowhere")


def test_every_command_reads_a_pushed_run(hub: FakeHub, trained: Path, tmp_path: Path) -> None:
    commit = json.loads(succeeds("push", str(trained), "me/shapes", "--json").stdout)["commit"]
    small = ("--num", "4", "--device", "cpu", "--json")
    ours = json.loads(succeeds("eval", str(trained), *small).stdout)
    theirs = json.loads(succeeds("eval", "me/shapes", "--against", "base", *small).stdout)
    assert theirs["results"] == ours["results"]
    assert theirs["target"] == f"me/shapes@{commit}"
    merged = succeeds("export", "me/shapes", str(tmp_path / "merged"), "--diffusers", "--json")
    assert json.loads(merged.stdout)["changed"] > 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "## Scores" in card
    assert (tmp_path / "merged" / "samples.png").is_file()
    lora = succeeds("export", "me/shapes", str(tmp_path / "kohya.safetensors"), "--kohya", "--json")
    assert json.loads(lora.stdout)["modules"] > 0
    # its recipe repeats the run; the prompts have stayed where they were
    assert "our-secret-prompts.txt'" in refused("train", "--config", "me/shapes", "--dry-run")
    plan = succeeds("train", "--config", "me/shapes", "--prompts", "shapes-train", "--dry-run", "--json")
    assert json.loads(plan.stdout)["recipe"]["rollout.groups"]["value"] == 2
    hub.add("me/nothing", {"README.md": b""})
    assert "holds no run" in refused("train", "--config", "me/nothing", "--dry-run")
    # as a plain copy of the repository too
    copy = tmp_path / "copy"
    for name, data in hub.repositories["me/shapes"].files().items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    assert picture(copy) == picture("me/shapes")
    (copy / LORA).write_bytes((copy / LORA).read_bytes()[:-1] + b"x")
    assert "is damaged" in refused("generate", PROMPT, "--from", str(copy))


def test_a_second_push_adds_a_commit_and_keeps_what_others_put_there(
    hub: FakeHub, shapes_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(shapes_run, tmp_path / "run"))
    succeeds("export", str(run), "--kohya")
    first = json.loads(succeeds("push", str(run), "me/shapes", "--json").stdout)
    repository = hub.repositories["me/shapes"]
    assert "kohya/kohya_lora.safetensors" in repository.files()
    again = json.loads(succeeds("push", str(run), "me/shapes", "--json").stdout)
    assert (again["commit"], again["changed"], again["created"]) == (first["commit"], False, False)
    repository.commit("main", {**repository.files(), "notes.txt": b"by hand"}, "A note")
    (run / "kohya_lora.safetensors").unlink()
    done = json.loads(
        succeeds("push", str(run), "me/shapes", "--json", "--commit-message", "Without kohya's file").stdout
    )
    assert done["deleted"] == ["kohya/kohya_lora.safetensors"]
    assert repository.files()["notes.txt"] == b"by hand"
    assert "kohya/kohya_lora.safetensors" not in repository.files()
    assert repository.messages[-1] == "Without kohya's file"
    assert repository.messages[1].startswith("checkpoint-1 of meanflow-shapes")
    elsewhere = json.loads(succeeds("push", str(run), "me/shapes", "--revision", "v2", "--json").stdout)
    assert repository.branches["v2"] == elsewhere["commit"]
    assert hub_source("me/shapes@v2") is not None
    assert picture("me/shapes@v2") == picture(run)
    assert "--from me/shapes@v3\n" in succeeds("push", str(run), "me/shapes", "--revision", "v3").stdout


def test_a_card_keeps_what_its_owner_wrote(hub: FakeHub, shapes_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(shapes_run, tmp_path / "run"))
    (tmp_path / "läufe").mkdir()
    card = run / "checkpoints" / "checkpoint-1" / "README.md"
    card.write_text(
        "---\nlicense: mit\nlanguage: en\ntags: [mine]\n---\n# My shapes\n\nHand-made.\n\n## Use\n\nold\n\n"
        "## Thanks\n\nAll.\n"
    )
    succeeds("push", str(run), "me/shapes")
    text = hub.repositories["me/shapes"].files()["README.md"].decode()
    facts = ModelCard(text).data.to_dict()
    assert (facts["license"], facts["language"], facts["library_name"]) == ("mit", "en", "diffusers")
    assert {"mine", "lora", "fmg"} <= set(facts["tags"])
    assert "Hand-made." in text
    assert "## Thanks\n\nAll." in text
    assert "\nold\n" not in text
    card.write_text("---\ntags: [\n---\n# My shapes\n")
    assert "front matter" in refused("push", str(run), "me/shapes", "--dry-run")
    card.write_text(f"# My shapes\n\nTrained in {Path.home()}/data.\n")
    error = refused("push", str(run), "me/shapes", "--dry-run")
    assert "README.md contains a path on this computer" in error
    elsewhere = Path(shutil.move(run, tmp_path / "läufe" / "run"))
    (elsewhere / card.relative_to(run)).write_text(f"# My shapes\n\n{json.dumps(f'{elsewhere}/data')}\n")
    assert "contains a path on this computer" in refused("push", str(elsewhere), "me/shapes", "--dry-run")


def test_a_checkpoint_that_no_update_has_changed_is_noted(hub: FakeHub, shapes_run: Path, tmp_path: Path) -> None:
    assert "does the same" not in succeeds("push", str(shapes_run), "me/shapes", "--dry-run").stderr
    run = Path(shutil.copytree(shapes_run, tmp_path / "run"))
    first = (run / "checkpoints" / "checkpoint-1").rename(run / "checkpoints" / "checkpoint-0")
    saved = replace(existing_index(shapes_run).saved[0], name=first.name, iteration=0)
    write_index(run, CheckpointIndex((saved,), saved.name, saved.name))
    assert "is equivalent to the base" in succeeds("push", str(run), "me/shapes", "--dry-run").stderr


def test_only_the_lora_of_this_checkpoint_is_sent_in_kohyas_layout(
    hub: FakeHub, shapes_run: Path, other_shapes_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(shapes_run, tmp_path / "run"))
    succeeds("export", str(other_shapes_run), str(run / "kohya_lora.safetensors"), "--kohya")
    done = succeeds("push", str(run), "me/shapes", "--dry-run", "--json")
    assert "kohya/kohya_lora.safetensors" not in done.stdout.partition('"notes"')[0]
    assert "made from another checkpoint" in json.loads(done.stdout)["notes"][-1]


@pytest.mark.parametrize("trained_part", ["full", "duration"])
def test_whole_transformers_and_embedders_go_there_and_back(
    hub: FakeHub, trained_part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = {"full": "full", "duration": "lora+duration"}[trained_part]
    recipe = shapes_recipe(**{"train.trainable": part})
    run = make_run(tmp_path / "run", recipe, 5, trained_part)  # type: ignore[arg-type]
    succeeds("push", str(run), "me/shapes")
    names = set(hub.repositories["me/shapes"].files())
    expected = (
        {"fmg_extra.safetensors"} if trained_part == "duration" else {"fmg_transformer.json", "transformer/config.json"}
    )
    assert expected <= names
    before = picture(run)
    fresh_cache(monkeypatch, hub, tmp_path / "other")
    assert picture("me/shapes") == before


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(
    hub: FakeHub, shapes_run: Path, shapes_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(shapes_run)
    assert "not the name of a repository" in refused("push", run, "shapes", "--dry-run")
    assert "not the name of a repository" in refused("push", run, "me/a b")
    for branch in ("a b", "../v2", "v2/", "a..b", "-x", "v2.lock"):
        assert f"'{branch}' is not the name of a branch" in refused("push", run, "me/shapes", "--revision", branch)
    assert "a model that has not been trained" in refused("push", "meanflow-shapes", "me/shapes")
    assert "There is no run or artifact 'you/shapes' here" in refused("push", "you/shapes", "me/shapes")
    assert "neither a model nor a run folder" in refused("push", "nowhere", "me/shapes")
    assert "--offline" in refused("push", run, "me/shapes", "--offline")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model_index.json").write_text("{}")
    assert "hf upload OWNER/NAME" in refused("push", str(tmp_path / "folder"), "me/shapes")
    assert "an artifact does not have" in refused("push", str(shapes_artifact.folder), "me/a", "--set", "lora.rank=2")
    monkeypatch.delenv("HF_TOKEN")
    error = refused("push", run, "me/shapes")
    assert "No token for the hub" in error
    assert "hf auth login" in error
    assert hub.paths() == []


def test_a_local_base_is_refused_and_named_by_set(hub: FakeHub, tmp_path: Path) -> None:
    from fmg.models.embedded import MeanFlowShapesConfig

    base = Path(shutil.copytree(MeanFlowShapesConfig().directory(), tmp_path / "my-base"))
    run = make_run(tmp_path / "run", shapes_recipe(**{"model.folder": str(base)}), 1)
    error = refused("push", str(run), "me/shapes", "--dry-run")
    assert f"model.folder={base}, which nobody else can load" in error
    assert "--set model.folder=owner/name" in error
    succeeds("push", str(run), "me/shapes", "--set", "model.folder=null")
    assert str(base).encode() not in b"".join(hub.repositories["me/shapes"].files().values())
    # the weights of the copy are those of the package
    assert picture("me/shapes") == picture(run)


def test_repositories_that_hold_something_else_are_left_alone(
    hub: FakeHub, shapes_run: Path, shapes_artifact: Artifact
) -> None:
    run = str(shapes_run)
    succeeds("push", run, "me/shapes")
    assert "holds a run, and" in refused("push", str(shapes_artifact.folder), "me/shapes")
    error = refused("push", run, "me/shapes", "--private")
    assert "exists already and is public" in error
    other = hub.add("me/other", {"model_index.json": b"{}", "README.md": b"mine"})
    assert "such as model_index.json" in refused("push", run, "me/other")
    assert len(other.commits) == 1
    # one that was just made on the site
    hub.add("me/new", {".gitattributes": b"", "README.md": b"---\nlicense: mit\n---\n"})
    succeeds("push", run, "me/new")


@pytest.mark.parametrize(
    ("status", "method", "pattern", "said"),
    [
        (401, "GET", "/api/models/", "The hub rejects the token: on purpose"),
        (403, "POST", "/commit/", "The token may not write to 'me/shapes': on purpose"),
        (404, "POST", "/commit/", "The hub does not find 'me/shapes': on purpose"),
        (409, "POST", "/commit/", "'me/shapes' was changed by somebody else during the push: on purpose"),
        (413, "POST", "/commit/", "The hub does not accept files of this size: on purpose"),
        (429, "POST", "/commit/", "The hub limits the number of requests: on purpose"),
        (500, "POST", "/repos/create", "The hub failed with status 500: on purpose"),
        (503, "POST", "/commit/", "The hub failed with status 503: on purpose"),
        (403, "PUT", "/store/", "The token may not write to 'me/shapes'"),
        (418, "POST", "/commit/", "The hub refused with status 418: on purpose"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_and_commits_nothing(
    hub: FakeHub, shapes_run: Path, status: int, method: str, pattern: str, said: str
) -> None:
    hub.before = fails(status, method, pattern)
    error = refused("push", str(shapes_run), "me/shapes")
    assert error.startswith(said)
    assert "me/shapes" not in hub.repositories or len(hub.repositories["me/shapes"].commits) == 1
    hub.before = None
    succeeds("push", str(shapes_run), "me/shapes")


def test_tokens_that_may_not_write_are_named(hub: FakeHub, shapes_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "may not write to 'you/shapes'" in refused("push", str(shapes_run), "you/shapes")
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    assert "may not write to 'me/shapes'" in refused("push", str(shapes_run), "me/shapes")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "rejects the token" in refused("push", str(shapes_run), "me/shapes")
    assert hub.repositories == {}


def test_a_commit_of_somebody_else_during_a_push_is_not_overwritten(hub: FakeHub, shapes_run: Path) -> None:
    succeeds("push", str(shapes_run), "me/shapes")
    repository = hub.repositories["me/shapes"]

    def meanwhile(handler: Handler, call: Call) -> bool:
        if "/preupload/" in call.path:
            repository.commit("main", {**repository.files(), "README.md": b"theirs"}, "Theirs")
        return False

    hub.before = meanwhile
    assert "was changed by somebody else" in refused("push", str(shapes_run), "me/shapes")
    assert repository.files()["README.md"] == b"theirs"


def test_a_killed_upload_is_repeated_without_sending_twice(hub: FakeHub, shapes_run: Path) -> None:
    hanging, release = threading.Event(), threading.Event()
    sent: list[str] = []

    def slow(handler: Handler, call: Call) -> bool:
        if call.method == "PUT":
            sent.append(call.path)
            if len(sent) == 2:
                hanging.set()
                release.wait(60)
                handler.reset()
                return True
        return False

    hub.before = slow
    command = [sys.executable, "-m", "fmg", "push", str(shapes_run), "me/shapes"]
    process = subprocess.Popen(command, env={**os.environ}, start_new_session=True, stderr=subprocess.PIPE)
    assert hanging.wait(60)
    deadline = time.monotonic() + 20
    while not hub.stored and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    release.set()
    assert len(hub.repositories["me/shapes"].commits) == 1
    there, hub.before = set(hub.stored), None
    assert len(there) == 1
    assert hub.server is not None
    hub.server.calls.clear()
    succeeds("push", str(shapes_run), "me/shapes")
    assert not {path.rpartition("/")[2] for path in hub.paths("PUT")} & there
    assert picture("me/shapes") == picture(shapes_run)


def test_python_pushes_and_reads(hub: FakeHub, shapes_run: Path) -> None:
    pushed = api.push(RunFolder(shapes_run), "me/shapes", message="From Python")
    assert repr(pushed) == f"Pushed({shapes_run} to me/shapes@{pushed.commit})"
    with api.load("me/shapes", device="cpu") as theirs, api.load(shapes_run, device="cpu") as ours:
        assert (theirs.generate(PROMPT).image_array == ours.generate(PROMPT).image_array).all()
    with pytest.raises(api.UsageError, match=r"'me/shapes' exists already and is public.*leave out 'private'"):
        api.push(shapes_run, "me/shapes", private=True)


def test_the_pipeline_and_stock_diffusers_read_a_pushed_lora(hub: FakeHub, shapes_run: Path) -> None:
    """What the card says about Python."""
    from diffusers import FluxPipeline
    from safetensors.torch import load_file

    succeeds("push", str(shapes_run), "me/shapes")
    stated = FluxPipeline.lora_state_dict("me/shapes")
    ours = load_file(shapes_run / "checkpoints" / "checkpoint-1" / LORA)
    lora = {name: tensor for name, tensor in ours.items() if not name.endswith(".alpha")}
    assert {name for name in stated if "lora" in name} == set(lora)
    assert all(bool((stated[name] == lora[name]).all()) for name in lora)
    pipe = api.FlowMapPipeline.from_model("meanflow-shapes")
    pipe.load_lora_weights("me/shapes")
    image = pipe(PROMPT, num_inference_steps=4, grid="uniform", seeds=0, output_type="pt").images
    with api.load(shapes_run, device="cpu") as generator:
        expected = generator.generate(PROMPT, seeds=[0]).images
    assert float((image - expected).abs().max()) < 1e-5


def test_the_digests_of_a_pushed_run_are_those_of_its_files(hub: FakeHub, shapes_run: Path) -> None:
    succeeds("push", str(shapes_run), "me/shapes")
    files = hub.repositories["me/shapes"].files()
    lines = dict(reversed(line.split("  ")) for line in files[SUMS].decode().splitlines())
    checkpoint = shapes_run / "checkpoints" / "checkpoint-1"
    assert lines[LORA] == digest(checkpoint / LORA)
    # the card is edited on the hub
    assert set(lines) == set(files) - {"README.md", SUMS, ".gitattributes", "samples.png", "before_after.png"}
