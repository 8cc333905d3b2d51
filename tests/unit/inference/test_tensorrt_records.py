from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fmg.core.errors import CheckpointError
from fmg.core.files import digest
from fmg.inference.tensorrt.flavours import ANY, RTX, TENSORRT, Gpu
from fmg.inference.tensorrt.records import (
    EngineHost,
    EngineRecord,
    Ingredients,
    Profile,
    ShapeRange,
    built_here,
    check_plan,
    engine_name,
    note_built,
    read_record,
    read_records,
)

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580")
A100 = Gpu("NVIDIA A100-SXM4-80GB", "8.0", "580")
T4 = Gpu("Tesla T4", "7.5", "580")
PROFILE = Profile("512px", {"x": ShapeRange((1, 4), (2, 4), (8, 4))})
MADE = Ingredients(
    onnx="a" * 64,
    weights="b" * 64,
    profiles=(PROFILE,),
    options={"level": 3, "hardware": "none", "version_compatible": False},
    flavour="tensorrt",
    version="11.4.0.106",
    gpu=H100.name,
    capability=H100.capability,
    driver=H100.driver,
    polygraphy="0.53.6",
)
CHANGES = {
    "onnx": "c" * 64,
    "weights": "c" * 64,
    "profiles": (replace(PROFILE, shapes={"x": ShapeRange((1, 4), (2, 4), (9, 4))}),),
    "options": {**MADE.options, "level": 4},
    "flavour": "rtx",
    "version": "11.4.1",
    "gpu": A100.name,
    "capability": "9.1",
    "driver": "590",
    "polygraphy": "0.54.0",
}


def record(ingredients: Ingredients = MADE, plan: bytes = b"plan") -> EngineRecord:
    name = engine_name("transformer", ingredients.key())
    import hashlib

    digest = hashlib.sha256(plan).hexdigest()
    layers = {"MATRIX_MULTIPLY": {"FLOAT": 3}}
    return EngineRecord(
        1, ingredients.key(), "transformer", f"{name}.plan", len(plan), digest, ingredients, "fp32", layers, 1.5
    )


def write(folder: Path, entry: EngineRecord, plan: bytes = b"plan") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / entry.plan).write_bytes(plan)
    path = folder / entry.plan.replace(".plan", ".json")
    path.write_text(entry.to_json())
    return path


def test_every_ingredient_is_known_to_the_test() -> None:
    assert CHANGES.keys() == {field.name for field in fields(Ingredients)}


@pytest.mark.parametrize("name", CHANGES)
def test_another_ingredient_gives_another_key(name: str) -> None:
    assert replace(MADE, **{name: CHANGES[name]}).key() != MADE.key()


def test_the_order_of_options_and_inputs_does_not_matter() -> None:
    shapes = {"y": ShapeRange((1,), (1,), (1,)), **PROFILE.shapes}
    one = replace(MADE, profiles=(replace(PROFILE, shapes=shapes),))
    other = replace(
        MADE,
        options=dict(reversed(MADE.options.items())),
        profiles=(replace(PROFILE, shapes=dict(reversed(shapes.items()))),),
    )
    assert one.key() == other.key()


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "engines", record())
    assert read_record(path) == record()
    assert read_records(tmp_path) == [record()]
    assert digest(check_plan(tmp_path / "engines", record())) == record().sha256


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"plan": "../transformer.plan"}, "is inconsistent"),
        ({"key": "0" * 64}, "is inconsistent"),
        ({"size": "4"}, "size is '4' instead of int"),
        ({"extra": 1}, "extra is not a known key"),
    ],
)
def test_a_record_that_is_not_as_written_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = write(tmp_path, record())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=says):
        read_record(path)


def test_a_record_whose_ingredients_were_changed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, record())
    path.write_text(path.read_text().replace('"level": 3', '"level": 5'))
    with pytest.raises(CheckpointError, match="is inconsistent"):
        read_record(path)


def test_text_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a record of an engine"):
        read_record(tmp_path / "x.json")


@pytest.mark.parametrize("plan", [b"plaN", b"plan+", b""])
def test_a_damaged_plan_is_refused(tmp_path: Path, plan: bytes) -> None:
    write(tmp_path, record(), plan)
    with pytest.raises(CheckpointError, match="is damaged"):
        check_plan(tmp_path, record())


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        check_plan(tmp_path, record())


def _compatible(**options: object) -> EngineRecord:
    return record(replace(MADE, options={**MADE.options, **options}))


@pytest.mark.parametrize(
    ("entry", "version", "gpu", "says"),
    [
        (record(), "11.4.0.106", H100, ""),
        (record(), "11.5.0.1", H100, "was built with version 11.4.0.106"),
        (_compatible(version_compatible=True), "11.5.0.1", H100, ""),
        (record(), "11.4.0.106", None, "cannot run: there is no GPU here"),
        (record(), "11.4.0.106", replace(H100, driver="600"), ""),
        (record(), "11.4.0.106", replace(H100, name="NVIDIA H200"), "was built for NVIDIA H100"),
        (_compatible(hardware="same-capability"), "11.4.0.106", replace(H100, name="NVIDIA H200"), ""),
        (_compatible(hardware="same-capability"), "11.4.0.106", A100, "was built for"),
        (_compatible(hardware="ampere-plus"), "11.4.0.106", A100, ""),
        (_compatible(hardware="ampere-plus"), "11.4.0.106", T4, "was built for"),
        (record(replace(MADE, flavour="rtx")), "11.4.0.106", H100, "was built with rtx"),
    ],
)
def test_what_fits_a_machine(entry: EngineRecord, version: str, gpu: Gpu | None, says: str) -> None:
    reason = entry.misfit(EngineHost(TENSORRT, version, gpu))
    assert reason.startswith(says)
    assert bool(reason) == bool(says)


def test_an_engine_built_ahead_of_time_fits_every_gpu() -> None:
    entry = record(replace(MADE, flavour="rtx", gpu=ANY, capability=ANY, driver=ANY))
    assert entry.misfit(EngineHost(RTX, "11.4.0.106", T4)) == ""


def test_a_range_admits_its_shapes_and_nothing_else() -> None:
    found = PROFILE.shapes["x"]
    assert found.admits((1, 4))
    assert found.admits((8, 4))
    for shape in ((0, 4), (9, 4), (2, 5), (2,)):
        assert not found.admits(shape)


@pytest.mark.parametrize("digest", ["", ".", "../built", "/etc/passwd", "A" * 64, "0" * 64])
def test_a_digest_that_was_not_recorded_is_foreign(
    digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path))
    note_built("1" * 64)
    assert built_here("1" * 64)
    assert not built_here(digest)
