"""The trackers. Each shows one curve for a run, however often it is resumed.

docs/adr/0028-trackers.md explains why none is from Accelerate. Each library is imported when its tracker is opened.
"""

from __future__ import annotations

import bisect
import json
import os
import re
import shlex
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmg.core import metric_keys as keys
from fmg.core.errors import reason
from fmg.core.hub import is_offline
from fmg.core.images import decoded
from fmg.core.protocols import TrackedRun
from fmg.recipe.document import leaves
from fmg.trackers.configs import (
    MlflowConfig,
    ProjectConfig,
    SwanLabConfig,
    TensorBoardConfig,
    TrackioConfig,
    WandbConfig,
)

SAMPLES = "samples"
"""The key of sample grids."""
RECIPE = "recipe"


class TensorBoard:
    """Event files, written by TensorBoard's own writer, which needs neither torch nor TensorFlow."""

    def __init__(self, config: TensorBoardConfig) -> None:
        pass

    def open(self, run: TrackedRun) -> tuple[int, str]:
        """Starts a new event file, which makes TensorBoard drop what older ones contain from the resumed step on."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(run.folder))
        kept = run.iterations[: run.logged]
        # an evaluation has the step of the iteration before it, so that iteration is written again
        step = kept[-1] if kept else 0
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, session_log=start))
        if step == 0:
            text = f"```json\n{json.dumps(run.recipe, indent=2)}\n```"
            self._add(0, self._summary(value=text_pb(RECIPE, text).value))
        first = bisect.bisect_left(run.iterations, step) if kept else 0
        return first, f"tensorboard --logdir {shlex.quote(str(run.path))}"

    def log(self, index: int, line: Mapping[str, float], grid: Path | None) -> None:
        """Adds a scalar for each value, and the grid."""
        value = self._summary.Value
        values = [value(tag=key, simple_value=number) for key, number in _without_iteration(line).items()]
        if grid is not None:
            width, height = decoded(grid, lambda picture: picture.size)
            image = self._summary.Image(
                width=width, height=height, colorspace=3, encoded_image_string=grid.read_bytes()
            )
            values.append(value(tag=SAMPLES, image=image))
        self._add(int(line[keys.ITERATION]), self._summary(value=values))
        self._writer.flush()

    def _add(self, step: int, summary: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self, ended: bool) -> None:
        """Closes the file."""
        self._writer.close()


class Wandb:
    """Weights & Biases.

    A row of its history is a line of `metrics.jsonl`, plotted over `iteration`: its own step must increase, and an
    iteration may have two lines.
    """

    def __init__(self, config: WandbConfig) -> None:
        self._config = config

    def open(self, run: TrackedRun) -> tuple[int, str]:
        """Resumes the run on the server. An offline run cannot be resumed, so it is written anew."""
        # no crash reports, and no network where the user is offline
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        config = self._config
        offline = is_offline() if config.offline is None else config.offline
        try:
            online = not offline and wandb.login(prompt=False)
        except wandb.Error as error:
            run.warn(f"the login failed, so the run stays offline: {reason(error)}")
            online = False
        if not online:
            for superseded in (run.folder / "wandb").glob(f"offline-run-*-{run.id}"):
                shutil.rmtree(superseded)
        # wandb would silently write elsewhere
        run.folder.mkdir(parents=True, exist_ok=True)
        self._image = wandb.Image
        self._run = wandb.init(
            id=run.id,
            resume="allow",
            mode="online" if online else "offline",
            dir=run.folder,
            project=config.project,
            name=_shown(config, run),
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            config=dict(run.recipe),
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True, symlink=False, x_stats_pid=run.process),
        )
        for link in Path(self._run.settings.sync_dir).rglob("*"):
            # one leads to a log in the user's cache, and a run with links that lead out of it is not resumed
            if link.is_symlink():
                link.unlink()
        self._run.define_metric("*", step_metric=keys.ITERATION)
        where = self._run.url if online else f"wandb sync {shlex.quote(self._run.settings.sync_dir)}"
        return self._run.step, str(where)

    def log(self, index: int, line: Mapping[str, float], grid: Path | None) -> None:
        """Logs one row."""
        images = {} if grid is None else {SAMPLES: self._image(str(grid))}
        self._run.log({**line, **images}, step=index)

    def close(self, ended: bool) -> None:
        """Uploads what is pending."""
        self._run.finish(exit_code=0 if ended else 1)


class Trackio:
    """Trackio: its local store, the server in TRACKIO_SERVER_URL, or the Space in TRACKIO_SPACE_ID."""

    def __init__(self, config: TrackioConfig) -> None:
        self._config = config

    def open(self, run: TrackedRun) -> tuple[int, str]:
        """Resumes the run of this name, which holds the id, and counts its rows."""
        # trackio never raises: it warns, keeps what it cannot send, and sends it later
        warnings.showwarning = lambda message, *_: run.warn(str(message))
        # PYTHONWARNINGS may turn them off, or into errors
        warnings.simplefilter("always", UserWarning)
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        # trackio makes a folder of this name, wherever a `/` in it leads
        project, name = self._config.project, f"{folder_name(_shown(self._config, run))}-{run.id}"
        self._image = trackio.Image
        self._run = trackio.init(project, name, config=dict(run.recipe), resume="allow", embed=False)
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        if remote:
            return run.logged, remote.partition("?")[0]
        # it writes rows twice a second, so that a killed machine may have lost some
        rows = SQLiteStorage.get_logs(project, name, run_id=self._run.id)
        return len(rows), f"trackio show --project {shlex.quote(project)}"

    def log(self, index: int, line: Mapping[str, float], grid: Path | None) -> None:
        """Logs one row."""
        images = {} if grid is None else {SAMPLES: self._image(str(grid))}
        self._run.log({**_without_iteration(line), **images}, step=int(line[keys.ITERATION]))

    def close(self, ended: bool) -> None:
        """Writes what is pending."""
        self._run.finish()


class SwanLab:
    """SwanLab, which ignores a second value of a key at one step."""

    def __init__(self, config: SwanLabConfig) -> None:
        self._config = config

    def open(self, run: TrackedRun) -> tuple[int, str]:
        """Resumes the run on the server. An offline run cannot be resumed, so it is written anew."""
        import swanlab

        config = self._config
        offline = is_offline() if config.offline is None else config.offline
        online = not offline and swanlab.Settings().api_key is not None
        if not online:
            for superseded in run.folder.glob(f"run-*-{run.id}"):
                shutil.rmtree(superseded)
        self._swanlab = swanlab
        opened = swanlab.init(
            id=run.id,
            resume="allow",
            mode="online" if online else "offline",
            log_dir=str(run.folder),
            project=config.project,
            name=_shown(config, run),
            workspace=config.workspace,
            tags=list(config.tags),
            config=dict(run.recipe),
        )
        if online:
            return run.logged, str(opened.url)
        (folder,) = run.folder.glob(f"run-*-{run.id}")
        return 0, f"swanlab sync {shlex.quote(str(folder))}"

    def log(self, index: int, line: Mapping[str, float], grid: Path | None) -> None:
        """Logs the values of one step, and the grid."""
        images = {} if grid is None else {SAMPLES: self._swanlab.Image(str(grid))}
        self._swanlab.log({**_without_iteration(line), **images}, step=int(line[keys.ITERATION]))

    def close(self, ended: bool) -> None:
        """Uploads what is pending."""
        self._swanlab.finish(state="success" if ended else "crashed")


class Mlflow:
    """MLflow. A run is found again by a tag, because the server chooses its id."""

    _TAG = "fmg.run"
    # limits of one request
    _METRICS, _PARAMS, _PARAM_LENGTH = 1000, 100, 6000

    def __init__(self, config: MlflowConfig) -> None:
        self._config = config

    def open(self, run: TrackedRun) -> tuple[int, str]:
        """Finds or creates the run, and counts its lines."""
        # by default mlflow retries a server for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, mlflow.MlflowClient()
        project, uri = self._config.project, mlflow.get_tracking_uri()
        known = self._client.get_experiment_by_name(project)
        experiment = self._client.create_experiment(project) if known is None else known.experiment_id
        where = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        if found := self._client.search_runs([experiment], f"tags.\"{self._TAG}\" = '{run.id}'", max_results=1):
            self._id = found[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return len(self._client.get_metric_history(self._id, keys.ITERATION)), where
        name, tags = _shown(self._config, run), {self._TAG: run.id}
        self._id = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
        texts = {path: str(value) for path, value in leaves(dict(run.recipe), into_lists=True)}
        params = [Param(path, text) for path, text in texts.items() if len(text) <= self._PARAM_LENGTH]
        for at in range(0, len(params), self._PARAMS):
            self._client.log_batch(self._id, params=params[at : at + self._PARAMS])
        return 0, where

    def log(self, index: int, line: Mapping[str, float], grid: Path | None) -> None:
        """Logs the values of one line, and the grid."""
        step, now = int(line[keys.ITERATION]), int(time.time() * 1000)
        if grid is not None:
            decoded(grid, lambda picture: self._client.log_image(self._id, picture, key=SAMPLES, step=step))
        # last, because the lines are counted by the metric `iteration`
        metrics = [self._metric(key, number, now, step) for key, number in reversed(tuple(line.items()))]
        for at in range(0, len(metrics), self._METRICS):
            self._client.log_batch(self._id, metrics=metrics[at : at + self._METRICS])

    def close(self, ended: bool) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._id, "FINISHED" if ended else "FAILED")


def _shown(config: ProjectConfig, run: TrackedRun) -> str:
    return config.run_name or run.name


def folder_name(text: str) -> str:
    """A text as the name of one folder: without separators, and short enough for file systems even with an id."""
    return re.sub(r"[/\\\0]", "-", text).encode()[:200].decode(errors="ignore")


def _without_iteration(line: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a tracker plots over its own step, which is the iteration."""
    return {key: number for key, number in line.items() if key != keys.ITERATION}
