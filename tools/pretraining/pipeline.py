"""The whole pretraining, stage by stage; a finished stage is kept on disk and reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.core.events import Notice, Observer, StageProgress, ignore
from fmg.core.files import atomic_file
from fmg.models.conventions import Takes
from pretraining.distill import ExactTeacher, Teacher, Trajectories, distill, solve_trajectories
from pretraining.flow import ConditionalNet, build_pool, build_transformer, train_flow
from pretraining.folder import CardFacts, Model, load_model, sample_images, save_model, write_card
from pretraining.networks import PromptTable, build_encoders, build_tokenizers, train_autoencoder
from pretraining.settings import SHAPES, TEXT, DistillSettings, PretrainSettings
from pretraining.shapes import ShapesWorld
from pretraining.world import World

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Figures = dict[int, Mapping[str, float]]
"""Scores of a model by number of steps."""

PACKED = 4
STEP_COUNTS = (1, 2, 4)
_TWO_TIME_METHOD = (
    "It is a two-time map in the form of MeanFlow: one network evaluation takes a state from any time t to any\n"
    "earlier time s. It was regressed on solved trajectories of its teacher, at random pairs of times."
)
_SINGLE_TIME_METHOD = (
    "It is a single-time consistency map: one network evaluation takes a state from any time t to the data.\n"
    "It was distilled, with weights of its own, by regressing the end of solved trajectories of its teacher."
)


def pretrain(
    world: World, settings: PretrainSettings, out_dir: Path, seed: int = 0, progress: Observer = ignore
) -> dict[str, Figures]:
    """Train the models of a world from random weights: `meanflow-NAME`, and `scm-NAME` if it has settings.

    Args:
        world: the images and their captions.
        settings: all numbers of the training.
        out_dir: receives the model folders and `stages/`, where a later call finds the finished stages with
            the same world, seed and settings.
        seed: seed of every stage.
        progress: observer of `StageProgress` (stages autoencoder, flow, trajectories and the model names) and `Notice`
            events.

    Returns:
        Per model, the figures on held-out prompts by number of steps, measured on the stored weights.
    """
    return _Pretraining(world, settings, out_dir, seed, progress).run()


def shipped(world: str) -> tuple[World, PretrainSettings]:
    """The world and the settings that made the models which ship with the package: `shapes` or `text`."""
    if world == "shapes":
        return ShapesWorld(), SHAPES
    # reads signs with a text recogniser, whose packages are an extra
    from pretraining.signs import TextWorld

    return TextWorld(), TEXT


class _Pretraining:
    def __init__(self, world: World, settings: PretrainSettings, out_dir: Path, seed: int, progress: Observer) -> None:
        self.world, self.settings = world, settings
        self.out_dir, self.seed, self.progress = out_dir, seed, progress
        self.tokenizers = build_tokenizers(world, settings.text)
        self.table = PromptTable.of(world.prompts(), self.tokenizers)
        self.stages = out_dir / "stages"

    def run(self) -> dict[str, Figures]:
        autoencoder = self._autoencoder()
        teacher = self._teacher(autoencoder)
        bank = self._trajectories(teacher)
        figures: dict[str, Figures] = {}
        students: tuple[tuple[str, Takes, DistillSettings | None], ...] = (
            ("meanflow", "duration", self.settings.two_time),
            ("scm", "none", self.settings.single_time),
        )
        for family, second_time, settings in students:
            if settings is not None:
                name = f"{family}-{self.world.name}"
                figures[name] = self._student(name, second_time, settings, autoencoder, teacher, bank)
        return figures

    def _autoencoder(self) -> AutoencoderTiny:
        folder = self.stages / f"autoencoder-{self._digest(self.world, self.settings.autoencoder)}"
        if not (folder / "config.json").exists():
            trained = train_autoencoder(self.world, self.settings.autoencoder, self.seed, self._ticker("autoencoder"))
            trained.save_pretrained(folder)
        autoencoder = AutoencoderTiny.from_pretrained(folder)
        return autoencoder.eval().to(memory_format=torch.channels_last)

    def _teacher(self, autoencoder: AutoencoderTiny) -> ConditionalNet | ExactTeacher:
        flow, support = self.settings.flow, self.world.support()
        if flow is None:
            if support is None:
                raise ValueError(
                    f"the {self.world.name} world has infinitely many pictures: its teacher must be trained"
                )
            return ExactTeacher(support, autoencoder)
        net = self._network("none")

        def train() -> dict[str, Tensor]:
            pool = build_pool(self.world, flow, autoencoder, self.table, self.seed)
            train_flow(net, pool, self.table, flow, self.seed, self._ticker("flow"))
            return net.state_dict()

        net.load_state_dict(self._stage("flow", self._teacher_inputs(), train))
        return net.eval()

    def _trajectories(self, teacher: Teacher) -> Trajectories:
        def solve() -> dict[str, Tensor]:
            rng = np.random.default_rng([self.seed, 3])
            captions = self.table.index(self.world.captions(self.settings.trajectories.count, rng))
            ticker = self._ticker("trajectories")
            bank = solve_trajectories(teacher, self.table, captions, self.settings.trajectories, self.seed, ticker)
            return dict(vars(bank))

        return Trajectories(**self._stage("trajectories", [*self._teacher_inputs(), self.settings.trajectories], solve))

    def _student(
        self,
        name: str,
        second_time: Takes,
        settings: DistillSettings,
        autoencoder: AutoencoderTiny,
        teacher: ConditionalNet | ExactTeacher,
        bank: Trajectories,
    ) -> Figures:
        net = self._network(second_time)
        if isinstance(teacher, ConditionalNet):
            net.load_state_dict(teacher.state_dict(), strict=False)

        def train() -> dict[str, Tensor]:
            distill(net, self.table, bank, settings, self.seed, self._ticker(name))
            return net.state_dict()

        inputs = [
            *self._teacher_inputs(),
            self.settings.text,
            self.settings.transformer,
            self.settings.trajectories,
            settings,
        ]
        net.load_state_dict(self._stage(name, inputs, train))
        folder = self.out_dir / name
        model = Model(net.eval(), autoencoder, self.tokenizers, self.world.resolution)
        save_model(model, folder)
        figures = evaluate_folder(folder, self.world, self.settings.evaluation_images, self.seed)
        method = _SINGLE_TIME_METHOD if second_time == "none" else _TWO_TIME_METHOD
        facts = CardFacts(name, method, self.seed, settings, model.parameters, figures)
        write_card(folder, self.world, facts, self.settings)
        score = self.world.score
        self.progress(Notice("info", f"{name}: held-out {score} {figures[4][score]:.3f} at 4 steps, in {folder}"))
        return figures

    def _network(self, second_time: Takes) -> ConditionalNet:
        torch.manual_seed(self.seed)
        settings = self.settings
        encoders = build_encoders(settings.text, self.tokenizers)
        channels = PACKED * settings.autoencoder.latent_channels
        transformer = build_transformer(settings.transformer, settings.text, channels, second_time)
        return ConditionalNet(transformer, encoders, self.world.resolution, settings.text.t5_length)

    def _teacher_inputs(self) -> list[DataclassInstance]:
        settings = self.settings
        if settings.flow is None:
            return [self.world, settings.autoencoder]
        return [self.world, settings.autoencoder, settings.text, settings.transformer, settings.flow]

    def _digest(self, *inputs: DataclassInstance) -> str:
        """Short name of the seed and of all settings that a stage's result depends on."""
        text = json.dumps([self.seed, *(asdict(settings) for settings in inputs)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _stage(
        self, name: str, inputs: Sequence[DataclassInstance], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The stage's tensors, from disk or computed now; a file gets its name when it is complete."""
        path = self.stages / f"{name}-{self._digest(*inputs)}.safetensors"
        if not path.exists():
            made = {key: value.clone() for key, value in make().items()}
            with atomic_file(path) as partial:
                save_file(made, partial)
        return load_file(path)

    def _ticker(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(StageProgress(stage, done, total))


def evaluate_folder(folder: Path, world: World, images: int, seed: int) -> Figures:
    """Scores on held-out prompts, cycled in order, by number of steps."""
    model = load_model(folder)
    prompts = world.heldout_prompts()
    said = [prompts[i % len(prompts)] for i in range(images)]
    return {
        steps: world.measure(sample_images(model.net, model.autoencoder, model.tokenizers, said, steps, seed), said)
        for steps in STEP_COUNTS
    }
