"""Examines an installation: what is installed, what is missing, and whether it computes. Needs no torch."""

from __future__ import annotations

import os
import re
import shutil
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from fmg.core.cache import cache_dir
from fmg.core.errors import FmgError, UsageError, one_line
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.files import from_home
from fmg.core.hub import OFFLINE, is_offline
from fmg.core.machine import environment, installed_version
from fmg.inference import onnxruntime as ort
from fmg.version import DISTRIBUTION, RUNTIME, install_line, is_runtime

Outcome = Literal["ok", "missing", "not contacted", "failed"]

_PURPOSES: Mapping[str, tuple[str, str]] = {
    "rewards": ("text cleaning of the published CLIP rewards", ""),
    "ocr": ("the rewards ocr and ocr-logp", ""),
    "server": ("fmg serve and fmg reward-server", ""),
    "ray": ("fmg serve --engine ray", ""),
    "onnx": ("fmg export, and artifacts in ONNX Runtime", ""),
    "trt": ("TensorRT engines", " --extra-index-url https://pypi.nvidia.com"),
    "trt-rtx": ("TensorRT-RTX engines", ""),
    "tensorboard": ("the tracker tensorboard", ""),
    "trackio": ("the tracker trackio", ""),
    "wandb": ("the tracker wandb", ""),
    "swanlab": ("the tracker swanlab", ""),
    "mlflow": ("the tracker mlflow", ""),
    "dev": ("the tests of fmg itself", ""),
    "docs": ("the documentation site", ""),
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
# an ONNX graph of one node: y = x + x
_SUM = "CAoSADo1Cg4KAXgKAXgSAXkiA0FkZBIBc1oPCgF4EgoKCAgBEgQKAggCYg8KAXkSCgoICAESBAoCCAJCBAoAEBQ="


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


def examine(
    self_test: Callable[[], Check] | None, *, network: bool = False, observer: Observer = ignore
) -> list[Check]:
    """Examines everything, and reports progress as `StageProgress("doctor", ...)`.

    Args:
        self_test: the last check; None leaves it out.
        network: whether to contact the indexes; otherwise the network is not used.
        observer: receives the progress.

    Raises:
        UsageError: `network` is set while offline mode forbids it.
    """
    if network and is_offline():
        raise UsageError(f"{OFFLINE} forbids network access, which --network needs", "Leave one of the two out.")
    checks = [Check("environment", name, "ok", value) for name, value in environment().items() if name != "devices"]
    checks += [*_distributions(), *_devices(), *_storage(), *_extras()]
    for number, (name, purpose) in enumerate(_INDEXES):
        if network:
            observer(StageProgress("doctor: indexes", number, len(_INDEXES)))
        checks.append(_contacted(name, purpose) if network else Check("index", name, "not contacted", purpose))
    if self_test is not None:
        observer(StageProgress("doctor: self-test", 0, 1))
        checks.append(self_test())
        observer(StageProgress("doctor: self-test", 1, 1))
    return checks


def self_tested(name: str, test: Callable[[], bool], done: str, advice: str) -> Check:
    """The outcome of a self-test.

    Args:
        name: what it does.
        test: whether the result is right; may raise.
        done: what was done.
        advice: how to find out more about a failure.
    """
    started = time.perf_counter()
    try:
        right = test()
    except Exception as error:
        return Check("self-test", name, "failed", one_line(error), advice)
    took = f"{time.perf_counter() - started:.1f} s: {done}"
    return Check("self-test", name, "ok" if right else "failed", took, "" if right else advice)


def computes() -> Check:
    """The self-test of an installation that only runs artifacts: a graph in ONNX Runtime."""
    return self_tested(
        "a graph in ONNX Runtime", _adds, "loaded and computed", "Verify an artifact: fmg verify ARTIFACT --alone"
    )


def _adds() -> bool:
    session = ort.open_session(b64decode(_SUM), [ort.CPU], threads=1)
    (doubled,) = session.run(None, {"x": np.array([1, 2], np.float32)})
    return bool((doubled == [2, 4]).all())


def _distributions() -> Iterator[Check]:
    """Whether the full distribution and the runtime, whose files are a part of it, are both installed."""
    found = {name: version for name in (DISTRIBUTION, RUNTIME) if (version := installed_version(name)) is not None}
    if len(found) > 1:
        both = " and ".join(f"{name} {version}" for name, version in found.items())
        advice = f"pip uninstall -y {' '.join(found)} && pip install {DISTRIBUTION}"
        yield Check("environment", "installed twice", "failed", f"{both} share files", advice)


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
    if find_spec("torch") is None:
        yield Check("device", "cpu", "ok", f"{os.cpu_count()} cores")
        try:
            providers = ort.installed().get_available_providers()
        except FmgError as error:
            yield Check("device", "onnxruntime", "failed", error.what, error.fix)
        else:
            yield Check("device", "onnxruntime", "ok", ", ".join(providers))
        return
    import torch

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
            yield Check("extra", extra, "missing", f"{purpose}; not installed: {', '.join(missing)}", line)
        else:
            yield Check("extra", extra, "ok", purpose)


def extras() -> dict[str, list[str]]:
    """Packages of each extra, as the installed metadata states them; empty when fmg is not installed."""
    distribution = RUNTIME if is_runtime() else DISTRIBUTION
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        if match := re.match(r"""([\w.-]+)[^;]*;.*extra\s*==\s*["']([\w-]+)["']""", line):
            package, extra = match.groups()
            found.setdefault(extra, []).extend([] if package == distribution else [package])
    return found
