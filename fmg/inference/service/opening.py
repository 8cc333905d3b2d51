"""Loads the targets of `fmg serve`, and generates a first image with each."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fmg.core.cache import content_hash
from fmg.core.errors import UsageError
from fmg.core.events import Notice, Observer, ignore
from fmg.inference.artifact.layout import Artifact
from fmg.inference.generator import Generator
from fmg.inference.hub_target import without_parents
from fmg.inference.loading import AUTO, find, load, pick_backend
from fmg.inference.openers import TorchOpener
from fmg.inference.service.models import BASE, OWN, Served, ServedModels

if TYPE_CHECKING:
    from fmg.inference.target import Target
    from fmg.models.common.held_adapters import HeldAdapters

# a colon separates a model from its adapter
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@-]{0,199}")
_NAMED = re.compile(r"(?P<name>[^=/]+)=(?P<target>.+)", re.DOTALL)
_WARM_UP = "a red circle"


@dataclass(frozen=True)
class Named:
    """A target and the name that clients use for it.

    Attributes:
        name: unique on the server.
        target: what to load.
        chosen: whether the user chose the name.
    """

    name: str
    target: str
    chosen: bool = False

    @property
    def shown(self) -> str:
        """The target without the folders of this computer."""
        return without_parents(self.target)


def newest_run() -> str:
    """The target of a server that was given none. Errors as `fmg.inference.loading.find`."""
    subject = find(None)
    assert not isinstance(subject, Artifact)
    return subject.label


def named_targets(texts: Sequence[str]) -> list[Named]:
    """Parses texts such as `runs/a` and `tuned=runs/a` into targets with names.

    A folder or a repository is named after its last part, or after as many parts as set it apart from the others:
    `a-artifact` and `b-artifact`.

    Raises:
        UsageError: a name cannot be used in a request, or two targets have the same name.
    """
    chosen: list[tuple[str | None, str]] = []
    for text in texts:
        match = None if Path(text).exists() else _NAMED.fullmatch(text)
        chosen.append((None, text) if match is None else (match["name"], match["target"]))
    own = _own_names([target for name, target in chosen if name is None], {name for name, _ in chosen if name})
    found = [Named(name or own[target], target, name is not None) for name, target in chosen]
    for named in found:
        if not _NAME.fullmatch(named.name):
            raise UsageError(
                f"'{named.name}' cannot be the name of a model",
                "Choose one of letters, digits, '.', '_' and '-': NAME=TARGET.",
            )
    name, times = Counter(named.name for named in found).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{times} targets are called '{name}'", "Name them: NAME=TARGET.")
    return found


def former_names(targets: Sequence[Named]) -> dict[str, str]:
    """Other names that clients may use: each target as it was given, if the user chose no name, with its model's
    name. A name of a model is never that of another."""
    names = {named.name for named in targets}
    return {named.target: named.name for named in targets if not named.chosen and named.target not in names}


def _own_names(targets: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """The name of each target: as few of its last parts as set it apart from the others and from names that are
    taken."""
    paths = {text: Path(text).resolve() if Path(text).is_dir() else _hub_path(text) for text in targets}
    parts = {text: path.relative_to(path.anchor).parts for text, path in paths.items()}
    names: dict[str, str] = {}
    for count in range(1, max([1, *map(len, parts.values())]) + 1):
        tried = {text: "-".join(parts[text][-count:]) for text in parts if text not in names}
        times = Counter([*taken, *names.values(), *tried.values()])
        names |= {text: name for text, name in tried.items() if times[name] == 1 or count >= len(parts[text])}
    return names


def _hub_path(text: str) -> PurePosixPath:
    # a revision such as `refs/pr/1` belongs to the name of its repository
    repository, at, revision = text.partition("@")
    return PurePosixPath(repository + at + revision.replace("/", "-"))


def open_served(
    targets: Sequence[Named],
    adapters: Mapping[tuple[str | None, str], Sequence[str]],
    options: Mapping[str, Any],
    max_adapters: int,
    stack: ExitStack,
    observer: Observer,
) -> ServedModels:
    """Loads every target as `open_models`, and then adapters of them.

    Args:
        adapters: runs by model and name, as `ServedModels.read_adapter` takes them.
        max_adapters: adapters per model.

    Raises:
        UsageError: two adapters have the same name, or as `ServedModels`.
        CheckpointError: as `ServedModels.read_adapter`.
    """
    models = ServedModels(
        open_models(targets, options, stack, observer, exchangeable=bool(adapters)),
        max_adapters,
    )
    for (model, name), runs in adapters.items():
        new = models.read_adapter(name, runs, model)
        if models.get(new.served.name) is not None:
            raise UsageError(
                f"Two adapters are called '{new.served.name}', once with the name of the model and once without",
                "Choose another name, or add them up: write both in the same way.",
            )
        models.install(new)
    return models


def open_models(
    targets: Sequence[Named],
    options: Mapping[str, Any],
    stack: ExitStack,
    observer: Observer,
    *,
    exchangeable: bool = False,
) -> list[Served]:
    """Loads every target. Each generates an image, so problems appear before the server listens.

    A run whose LoRA can be switched off is followed by its base, as `NAME:base`.

    Args:
        targets: what to serve.
        options: options of `fmg.inference.load`.
        stack: frees the models when it is closed.
        observer: receives a notice for each model, and the progress of downloads.
        exchangeable: whether `auto` takes the backend that can exchange adapters, where there is a choice.
    """
    return [model for named in targets for model in _opened(named, options, stack, observer, exchangeable)]


def _opened(
    named: Named, options: Mapping[str, Any], stack: ExitStack, observer: Observer, exchangeable: bool
) -> list[Served]:
    observer(Notice("info", f"Loading '{named.name}'"))
    subject = find(named.target, observer=observer)
    if exchangeable and not isinstance(subject, Artifact) and options.get("backend", AUTO) == AUTO:
        options = {**options, "backend": "torch"}
    exchanges = not isinstance(subject, Artifact) and _exchanges(subject, options)
    own = None if isinstance(subject, Artifact) else subject.adapter
    loaded = stack.enter_context(load(subject.base() if exchanges and own else subject, **options))  # type: ignore[union-attr]
    # the answers say which prompts are truncated
    generator = Generator(loaded.backend, loaded.grid, loaded.steps, loaded.batch_size, tells=False)
    held = _held(generator) if exchanges else None
    if own is not None and exchanges:
        _take(generator, held, own)
    image = generator.generate(_WARM_UP, progress=False).check_finite().image_array
    model = Served(named.name, named.shown, generator, (image.shape[3], image.shape[2]), held)
    if own is None or held is None:
        return [model]
    base = f"{named.name}:{BASE}"
    return [replace(model, adapter=OWN, base=base), replace(model, name=base)]


def weights_digest(target: str) -> str:
    """Sha256 over everything that the images of a target depend on, without loading it. Errors as `find`.

    Of a run or a model, its checkpoint, the files below it, and how it is sampled; of an artifact, what its manifest
    states. Files from the hub count by their commit.
    """
    subject = find(target, observer=ignore)
    if isinstance(subject, Artifact):
        return subject.manifest.sampling_digest()
    from fmg.core.hub import locate

    model, rollout = subject.recipe.model, subject.recipe.rollout
    facts = [f"{rollout.grid} {rollout.steps}"]
    for asset in model.config.assets():
        located = locate(asset, "model", model.name)
        if located.pinned != asset.source:
            facts.append(located.pinned)
        elif located.path.is_dir():
            facts += _content(located.path)
        else:
            facts += map(content_hash, located.files.values())
    if subject.adapter is not None:
        facts += _content(subject.adapter)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _content(folder: Path) -> list[str]:
    """The weights and settings below a folder, each as a digest and a name."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors"))
    return [f"{content_hash(file)} {file.relative_to(folder).as_posix()}" for file in files]


def _exchanges(subject: Target, options: Mapping[str, Any]) -> bool:
    """Whether adapters can be exchanged: in eager torch, unless the subject is a full fine-tune."""
    source = pick_backend(subject, options.get("backend", AUTO), device=options.get("device", AUTO))
    if not isinstance(source, TorchOpener):
        return False
    from fmg.models.common.checkpoint_files import is_full

    return subject.adapter is None or not is_full(subject.adapter)


def _held(generator: Generator) -> HeldAdapters | None:
    """Storage for adapters of a model that was loaded without one; None for a model from another package."""
    from fmg.inference.torch_backend import TorchBackend
    from fmg.models.common.held_adapters import HeldAdapters
    from fmg.models.common.model import AdaptedModel

    backend = generator.backend
    if isinstance(backend, TorchBackend) and isinstance(backend.model, AdaptedModel):
        return HeldAdapters(backend.model)
    return None


def _take(generator: Generator, held: HeldAdapters | None, adapter: Path) -> None:
    """Loads a run's own adapter."""
    if held is None:
        from fmg.inference.torch_backend import TorchBackend

        assert isinstance(generator.backend, TorchBackend)
        generator.backend.model.load_adapter(adapter)
        return
    held.put(OWN, held.read(adapter))
    held.use(OWN)
