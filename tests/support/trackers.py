"""Reads back what trackers wrote, with each service's own reader where it has one."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

Rows = dict[int, dict[str, float]]
"""Values by iteration and key; an iteration and its evaluation are one row."""

_BLOCK = 32768


def logged(run: Path) -> Rows:
    """The lines of `metrics.jsonl`."""
    from fmg.data.run_metrics import read_numbers

    rows: Rows = defaultdict(dict)
    for line in read_numbers(run / "metrics.jsonl"):
        rows[int(line["iteration"])] |= {key: value for key, value in line.items() if key != "iteration"}
    return dict(rows)


def assert_same(found: Rows, wanted: Rows, *, rel: float = 0.0, times_from: int = 10**9) -> None:
    """Equal values; of iterations from `times_from` on, times may differ."""
    assert {step: row.keys() for step, row in found.items()} == {step: row.keys() for step, row in wanted.items()}
    for step, row in wanted.items():
        timed = {key for key in row if key.startswith("time/") and step >= times_from}
        kept = {key: value for key, value in row.items() if key not in timed}
        assert {key: found[step][key] for key in kept} == pytest.approx(kept, rel=rel, abs=rel, nan_ok=True)


def tensorboard(run: Path) -> tuple[Rows, list[int], dict[str, Any]]:
    """Scalars, iterations with a grid, and the recipe; a value that appears twice fails the test."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers" / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    rows: Rows = defaultdict(dict)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in rows[event.step], f"{tag} twice at {event.step}"
            rows[event.step][tag] = event.value
    (recipe,) = events.Tensors("recipe")
    (text,) = recipe.tensor_proto.string_val
    values = json.loads(text.decode().removeprefix("```json\n").removesuffix("\n```"))
    return dict(rows), [event.step for event in events.Images("samples")], values


def wandb(run: Path) -> tuple[Rows, list[int], dict[str, Any]]:
    """The same of the one offline run that is to be uploaded."""
    from wandb.proto import wandb_internal_pb2 as messages

    (file,) = (run / "trackers" / "wandb" / "wandb").glob("offline-run-*/*.wandb")
    rows: Rows = defaultdict(dict)
    images: list[int] = []
    config: dict[str, Any] = {}
    for data in _records(file):
        record = messages.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") != "history":
            continue
        items = {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        iteration = int(items["iteration",])
        if grid := items.get(("samples", "path")):
            images.append(iteration)
            assert (file.parent / "files" / grid).is_file()
        values = {path[0]: value for path, value in items.items() if len(path) == 1 and not path[0].startswith("_")}
        del values["iteration"]
        assert not rows[iteration].keys() & values.keys(), f"iteration {iteration} twice"
        rows[iteration] |= values
    return dict(rows), images, config


def _records(file: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format after a header of seven bytes."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := _BLOCK - at % _BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        # 1: whole, 2: first part, 3: middle, 4: last
        if kind in (1, 4):
            yield record
            record = b""


def trackio(run: Path, project: str = "fmg") -> tuple[Rows, list[int], dict[str, Any]]:
    """The same of Trackio's local store."""
    from trackio.sqlite_storage import SQLiteStorage

    identity = json.loads((run / "trackers" / "tracked_run.json").read_text())
    name = f"{identity['name']}-{identity['id']}"
    rows: Rows = defaultdict(dict)
    images: list[int] = []
    for row in SQLiteStorage.get_logs(project, name):
        iteration = row.pop("step")
        if row.pop("samples", None):
            images.append(iteration)
        values = {key: value for key, value in row.items() if key != "timestamp"}
        assert not rows[iteration].keys() & values.keys(), f"iteration {iteration} twice"
        rows[iteration] |= values
    return dict(rows), images, dict(SQLiteStorage.get_run_config(project, name) or {})


def mlflow(run: Path, uri: str, project: str = "fmg") -> tuple[Rows, list[int], Mapping[str, str]]:
    """The same of an MLflow store."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    identity = json.loads((run / "trackers" / "tracked_run.json").read_text())
    experiment = client.get_experiment_by_name(project)
    (found,) = client.search_runs([experiment.experiment_id], f"tags.\"fmg.run\" = '{identity['id']}'")
    rows: Rows = defaultdict(dict)
    for key in found.data.metrics:
        for metric in client.get_metric_history(found.info.run_id, key):
            if key == "iteration":
                continue
            assert key not in rows[metric.step], f"{key} twice at {metric.step}"
            rows[metric.step][key] = metric.value
    images = [file.path for file in client.list_artifacts(found.info.run_id, "images") if file.path.endswith(".png")]
    return dict(rows), sorted(int(path.split("+step+")[1].split("+")[0]) for path in images), found.data.params
