"""The served models with the names that clients use, and adapters that are added while the server runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.core.errors import CheckpointError, UsageError, reason, suggestion
from fmg.inference import onnxruntime as ort
from fmg.inference.artifact.backend import ArtifactBackend
from fmg.inference.generator import Generator

if TYPE_CHECKING:
    from fmg.models.common.held_adapters import HeldAdapters, ReadAdapter

BASE = "base"
"""Name of a run's model without its adapter, after the colon: `RUN:base`."""
OWN = ""
"""Name of a run's own adapter, which no other adapter can have."""
_SQUARE = re.compile(r"([1-9][0-9]{0,4})x\1")
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Served:
    """A served model and the name that clients use for it.

    Attributes:
        name: unique on the server.
        target: the model, run or artifact, without the folders of this computer.
        generator: generates its images.
        size: width and height of its images.
        held: its adapters; None if they cannot be exchanged.
        adapter: name of the adapter that it uses; None for the base.
        base: the name of the same model without the adapter, if it has one.
    """

    name: str
    target: str
    generator: Generator
    size: tuple[int, int]
    held: HeldAdapters | None = None
    adapter: str | None = None
    base: str | None = None

    def use(self) -> str | None:
        """Makes its adapter the active one; returns the adapter's digest. Only between batches."""
        return None if self.held is None else self.held.use(self.adapter)

    def sampler(self, size: str | None) -> Generator:
        """The generator of images of a size such as `64x64`; None and `auto` are the model's own.

        Raises:
            UsageError: it has no such size. Only artifacts on ONNX Runtime have several.
        """
        own = "x".join(map(str, self.size))
        if size in (None, "auto", own):
            return self.generator
        backend, side = self.generator.backend, _SQUARE.fullmatch(size or "")
        if side is None or not isinstance(backend, ArtifactBackend) or backend.name != ort.NAME:
            raise UsageError(f"The model '{self.name}' does not generate images of {size}", f"Ask for {own} or auto.")
        generator = self.generator
        other = backend.at(int(side[1]))
        return Generator(other, generator.grid, generator.steps, generator.batch_size, tells=False)

    def facts(self) -> dict[str, object]:
        """The model's entry in `/info` and `/v1/models`, as plain JSON values."""
        backend = self.generator.backend
        return {
            "target": self.target,
            "base": self.base,
            "adapter_sha256": None if self.held is None else self.held.digest(self.adapter),
            "size": "x".join(map(str, self.size)),
            "steps": self.generator.steps,
            "backend": backend.name,
            "detail": backend.detail,
            "device": backend.device,
        }


@dataclass(frozen=True)
class NewAdapter:
    """An adapter that was read and fits, and the model that it will be served as."""

    served: Served
    read: ReadAdapter


class ServedModels:
    """The models of a server, including those that added adapters make.

    Args:
        models: models from the command line; the first is the default.
        max_adapters: maximum number of adapters per model, including the run's own.
    """

    def __init__(self, models: Sequence[Served], max_adapters: int = 16) -> None:
        self.default = models[0]
        self._models = {model.name: model for model in models}
        self._max = max_adapters

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._models.values()))

    def get(self, name: str | None) -> Served | None:
        """The model of this name; the default for None."""
        return self.default if name is None else self._models.get(name)

    def names(self) -> list[str]:
        """The names of all models."""
        return list(self._models)

    def read_adapter(self, name: str, runs: Sequence[str], model: str | None = None) -> NewAdapter:
        """Reads the adapter of a run, or the sum of several, for one of the models. Changes nothing.

        Args:
            name: the part after the colon in the name that clients use.
            runs: run folders, or checkpoints of them, on this computer, each perhaps with a weight: `runs/a=0.7`.
            model: name of the model; None takes the one that the adapter was trained on.

        Raises:
            UsageError: a name is wrong, or there is no such run or model.
            CheckpointError: files are missing or damaged, or the adapter was trained on other weights.
        """
        if not _ADAPTER.fullmatch(name) or name == BASE:
            raise UsageError(
                f"'{name}' cannot be the name of an adapter", "Choose another one of letters, digits, '.', '_' and '-'."
            )
        from fmg.inference.target import merged_target, resolve_target, weighted_run

        try:
            weighted = [weighted_run(run) for run in runs]
            there = [bool(run) and Path(run).is_dir() for run, _ in weighted]
        except OSError as error:
            raise UsageError(
                f"A run folder cannot be read: {reason(error)}", "Give the path of one on the server's computer."
            ) from None
        for (run, _), found in zip(weighted, there, strict=True):
            if not found:
                raise UsageError(f"There is no run folder '{run}'", "Give the path of one on the server's computer.")
        (first, weight), *others = weighted
        target = resolve_target(first) if weight == 1 and not others else merged_target(weighted)
        if target.adapter is None:
            raise UsageError(f"'{first}' has no adapter", "Give a run folder.")
        host, read = self._fitting(target.adapter, model)
        generator, rollout = host.generator, target.recipe.rollout
        served = replace(
            host,
            name=f"{host.name}:{name}",
            target=target.shown,
            generator=Generator(generator.backend, rollout.grid, rollout.steps, generator.batch_size, tells=False),
            adapter=name,
            base=host.base or host.name,
        )
        return NewAdapter(served, read)

    def install(self, new: NewAdapter) -> Served:
        """Adds an adapter, or replaces the one of its name. Only between batches.

        Raises:
            UsageError: the model has too many.
        """
        held, name = new.served.held, new.served.adapter
        assert held is not None
        assert name is not None
        if name not in held and len(held) >= self._max:
            raise UsageError(f"The model has {self._max} adapters already", "Replace one of them: use its name.")
        held.put(name, new.read)
        self._models[new.served.name] = new.served
        return new.served

    def _fitting(self, adapter: Path, model: str | None) -> tuple[Served, ReadAdapter]:
        """The model that an adapter was trained on, and the adapter."""
        hosts = {one.name: one for one in self._models.values() if ":" not in one.name}
        if model is not None and model not in hosts:
            raise UsageError(f"There is no model '{model}'", suggestion(model, hosts))
        misfit: CheckpointError | None = None
        for host in hosts.values() if model is None else [hosts[model]]:
            if host.held is None:
                continue
            try:
                return host, host.held.read(adapter)
            except CheckpointError as error:
                misfit = misfit or error
        raise misfit or UsageError(
            "No served model accepts adapters: only models and runs with a LoRA do, in torch",
            "Serve the model that the adapter was trained on, with --backend torch.",
        )
