"""Examines an installation: what is installed, what is missing, and one tiny training run."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from fmg.core import metric_keys as keys
from fmg.core.cache import cache_dir
from fmg.core.errors import UsageError, one_line
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.files import from_home
from fmg.core.hub import OFFLINE, is_offline
from fmg.core.machine import environment, installed_version
from fmg.recipe import Recipe
from fmg.training.api import train
from fmg.version import DISTRIBUTION, install_line

Outcome = Literal["ok", "missing", "not contacted", "failed"]

_PURPOSES: Mapping[str, tuple[str, str]] = {
    "rewards": ("text cleaning of the published CLIP rewards", ""),
    "ocr": ("the rewards ocr and ocr-logp", ""),
    "server": ("fmg reward-server", ""),
    "onnx": ("fmg export, and artifacts in ONNX Runtime", ""),
    "trt": ("TensorRT engines", " --extra-index-url https://pypi.nvidia.com"),
    "trt-rtx": ("TensorRT-RTX engines", ""),
    "tensorboard": ("the tracker tensorboard", ""),
    "trackio": ("the tracker trackio", ""),
    "wandb": ("the tracker wandb", ""),
    "swanlab": ("the tracker swanlab", ""),
    "mlflow": ("the tracker mlflow", ""),
    "dev": ("the tests of fmg itself", ""),
}
_HUB = "https://huggingface.co"
_CONTACT_S = 10
_INDEXES = (
    ("https://download.pytorch.org/whl/cpu", "torch without CUDA: pip install torch --index-url ..."),
    ("https://pypi.nvidia.com", "TensorRT's libraries: pip install ... --extra-index-url ..."),
    (_HUB, "weights: `fmg fetch`; runs and artifacts: `fmg push`, --from owner/name; HF_ENDPOINT names a mirror"),
)
_MIB = 1 << 20
_LOW_DISK = 2048 * _MIB
SELF_TEST: Mapping[str, object] = {
    "train.iterations": 1,
    "train.updates_per_iteration": 1,
    "rollout.groups": 2,
    "rollout.group_size": 4,
    "rollout.steps": 2,
    "eval.num": 4,
    "train.device": "cpu",
}
"""The run of the self-test: every stage of a real run, on eight images."""


@dataclass(frozen=True)
class Check:
    """One finding of the examination.

    Attributes:
        topic: `environment`, `device`, `storage`, `extra`, `index` or `self-test`.
        name: what was examined.
        outcome: `missing` is an extra that is not installed, `not contacted` an index without `--network`; only
            `failed` is a problem.
        found: the result.
        advice: what to do, if anything.
    """

    topic: str
    name: str
    outcome: Outcome
    found: str
    advice: str = ""


def examine(*, self_test: bool = True, network: bool = False, observer: Observer = ignore) -> list[Check]:
    """Examines everything, and reports progress as `StageProgress("doctor", ...)`.

    Args:
        self_test: whether to end with a tiny training run.
        network: whether to contact the indexes; otherwise the network is not used.
        observer: receives the progress.

    Raises:
        UsageError: `network` is set while offline mode forbids it.
    """
    if network and is_offline():
        raise UsageError(f"{OFFLINE} forbids network access, which --network needs", "Leave one of the two out.")
    checks = [Check("environment", name, "ok", value) for name, value in environment().items() if name != "devices"]
    checks += [*_devices(), *_storage(), *_extras()]
    for number, (name, purpose) in enumerate(_INDEXES):
        if network:
            observer(StageProgress("doctor: indexes", number, len(_INDEXES)))
        checks.append(_contacted(name, purpose) if network else Check("index", name, "not contacted", purpose))
    if self_test:
        observer(StageProgress("doctor: a tiny training run", 0, 1))
        checks.append(_self_test())
        observer(StageProgress("doctor: a tiny training run", 1, 1))
    return checks


def _contacted(index: str, purpose: str) -> Check:
    """Whether an index answers at all; any status will do."""
    url = os.environ.get("HF_ENDPOINT") or index if index == _HUB else index
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_CONTACT_S) as answer:
            found = f"answers with {answer.status}"
    except HTTPError as error:
        found = f"answers with {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        advice = "Check the connection and the proxy (HTTPS_PROXY)."
        return Check("index", index, "failed", f"{url} does not answer: {reason}; {purpose}", advice)
    return Check("index", index, "ok", f"{url} {found}; {purpose}")


def _devices() -> Iterator[Check]:
    yield Check("device", "cpu", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        advice = "" if built is None else "This torch has CUDA, but sees no GPU: check the driver (`nvidia-smi`)."
        yield Check("device", "cuda", "missing", "torch sees no GPU", advice)
    for index in range(torch.cuda.device_count()):
        name, (free, total) = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)
        yield Check("device", f"cuda:{index}", "ok", f"{name}, {free // _MIB} of {total // _MIB} MiB free")


def _storage() -> Iterator[Check]:
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub")
    places = {"runs": Path.cwd(), "cache of fmg": cache_dir(), "cache of the hub": from_home(hub)}
    for name, place in places.items():
        # the nearest existing folder tells whether the rest can be created
        there = next(folder for folder in (place, *place.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        found = f"{place}: {free // _MIB} MiB free"
        if not os.access(there, os.W_OK):
            yield Check("storage", name, "failed", found, f"'{there}' cannot be written: choose another place.")
        elif free < _LOW_DISK:
            yield Check("storage", name, "failed", found, f"Less than {_LOW_DISK // _MIB} MiB: free some space.")
        else:
            yield Check("storage", name, "ok", found)
    network = (
        "not used: HF_HUB_OFFLINE is set"
        if is_offline()
        else "used by `fmg fetch`, `fmg push`, and for runs and artifacts named owner/name"
    )
    yield Check("storage", "network", "ok", network)


def _extras() -> Iterator[Check]:
    for extra, packages in extras().items():
        purpose, index = _PURPOSES.get(extra, ("", ""))
        missing = [name for name in packages if installed_version(name) is None]
        if missing:
            line = f"{install_line(extra)}{index}"
            yield Check("extra", extra, "missing", f"{purpose}; without {', '.join(missing)}", line)
        else:
            yield Check("extra", extra, "ok", purpose)


def extras() -> dict[str, list[str]]:
    """Packages of each extra, as the installed metadata states them; empty when fmg is not installed."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        if match := re.match(r"""([\w.-]+)[^;]*;.*extra\s*==\s*["']([\w-]+)["']""", line):
            package, extra = match.groups()
            found.setdefault(extra, []).extend([] if package == DISTRIBUTION else [package])
    return found


def _self_test() -> Check:
    started = time.perf_counter()
    name = "one iteration of meanflow-shapes"
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = train(Recipe.default(None, **SELF_TEST), Path(folder) / "run", ignore)
            scored = keys.SCORE in result.final
    except Exception as error:
        return Check("self-test", name, "failed", one_line(error), "See where: fmg --debug train --iterations 1")
    took = f"{time.perf_counter() - started:.0f} s: generated, scored, updated, saved and read back"
    return Check("self-test", name, "ok" if scored else "failed", took)
