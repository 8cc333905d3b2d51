"""The generator on a backend that only records: seeds, batches, grids, and when the text encoders are freed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fmg.core.errors import StorageError, UsageError
from fmg.core.profiling import NOISE, TOTAL, StageClock, wall_clock
from fmg.core.protocols import Drawn, NoiseSource
from fmg.inference import Generator
from fmg.rl.keyed_noise import NoiseKey
from fmg.rl.rollouts import noise


class RecordingBackend:
    name, detail, device = "recording", "", "cpu"
    latent_shape = (2, 4, 4)

    def __init__(self) -> None:
        self.calls: list[str] = []

    def encode(self, prompts: Sequence[str]) -> tuple[str, ...]:
        self.calls.append(f"encode {len(prompts)}")
        return tuple(prompts)

    def draw(self, cond: tuple[str, ...], source: NoiseSource, times: Sequence[float]) -> Drawn:
        self.calls.append(f"draw {len(cond)}")
        latents = source(0) + 10 * source(1)
        return Drawn(np.zeros((len(cond), 3, 8, 8), np.float32), latents)

    def uncached(self) -> AbstractContextManager[None]:
        return nullcontext()

    def release_text(self) -> None:
        self.calls.append("release")

    def clock(self) -> StageClock[Any]:
        return wall_clock()

    def reset_peak_memory(self) -> None:
        return None

    def peak_memory(self) -> int:
        return 0

    def __enter__(self) -> RecordingBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.calls.append("closed")


def test_an_image_depends_on_its_seed_alone() -> None:
    seeds = [5, 0, 2**40, 5]
    drawn = [Generator(RecordingBackend(), "uniform", 2, batch).generate(["p"] * 4, seeds) for batch in (1, 3, 64)]
    for other in drawn[1:]:
        np.testing.assert_array_equal(drawn[0].latent_array, other.latent_array)
    keyed = [noise([NoiseKey(seed, -1, 0, 0, step) for seed in seeds], (2, 4, 4)) for step in (0, 1)]
    assert torch.equal(drawn[0].latents, keyed[0] + 10 * keyed[1])
    assert drawn[0].timings_ms[NOISE] <= drawn[0].timings_ms[TOTAL]


def test_text_encoders_go_before_the_first_image() -> None:
    backend = RecordingBackend()
    with Generator(backend, "uniform", 2, 2) as generator:
        generator.generate(list("abc"), [0, 1, 2], release_text=True)
    assert backend.calls == ["encode 2", "encode 1", "release", "draw 2", "draw 1", "closed"]


def test_otherwise_each_batch_is_encoded_when_it_is_generated() -> None:
    backend = RecordingBackend()
    seen: list[tuple[int, int]] = []
    Generator(backend, "uniform", 2, 2).generate(list("abc"), [0, 1, 2], progress=lambda *at: seen.append(at))
    assert backend.calls == ["encode 2", "draw 2", "encode 1", "draw 1"]
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize(("prompts", "seeds", "says"), [([], [], "no prompt"), (["a"], [0, 1], "2 seeds")])
def test_wrong_uses(prompts: list[str], seeds: list[int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Generator(RecordingBackend(), "uniform", 2).generate(prompts, seeds)


def test_an_explicit_grid_has_its_own_number_of_steps() -> None:
    generator = Generator(RecordingBackend(), (1.0, 0.3, 0.0), 2)
    assert generator.times() == (1.0, 0.3, 0.0)
    assert generator.times(1, "uniform") == (1.0, 0.0)
    with pytest.raises(UsageError, match="2 steps, but 3"):
        generator.times(3)
    with pytest.raises(UsageError, match="batch size"):
        Generator(RecordingBackend(), "uniform", 2, 0)


@pytest.mark.parametrize(
    ("prompts", "more", "texts", "seeds"),
    [
        ("a red circle", {}, ("a red circle",), (0,)),
        ("a", {"seeds": 7, "num": 3}, ("a", "a", "a"), (7, 8, 9)),
        (["a", "b"], {"num": 2}, ("a", "a", "b", "b"), (0, 1, 0, 1)),
        # a prompt that is repeated is not generated twice from one seed
        (["a", "b", "a"], {"seeds": 3}, ("a", "b", "a"), (3, 3, 4)),
        (("a", "b"), {"seeds": np.array([5, 6])}, ("a", "b"), (5, 6)),
        (["a", "b"], {"seeds": range(2)}, ("a", "b"), (0, 1)),
    ],
)
def test_a_text_or_a_list_with_default_seeds(
    prompts: Any, more: dict[str, Any], texts: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
    drawn = Generator(RecordingBackend(), "uniform", 2).generate(prompts, **more)
    assert (drawn.prompts, drawn.seeds, len(drawn)) == (texts, seeds, len(texts))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompts": 3}, "'prompts' is of type int"),
        ({"prompts": [3]}, "'prompts' is of type list"),
        ({"prompts": "a", "seeds": "0"}, "'seeds' is of type str"),
        ({"prompts": "a", "seeds": [0.5]}, "'seeds' is of type float"),
        ({"prompts": "a", "num": 1.5}, "'num' is of type float"),
        ({"prompts": "a", "steps": 2.0}, "'steps' is of type float"),
    ],
)
def test_a_wrong_type_is_a_type_error(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says) as caught:
        Generator(RecordingBackend(), "uniform", 2).generate(**arguments)
    assert isinstance(caught.value, UsageError)


def test_errors_of_a_python_call_name_arguments() -> None:
    generator = Generator(RecordingBackend(), "uniform", 2)
    with pytest.raises(UsageError, match=r"Set 'num' to at least 1"):
        generator.generate("a", num=0)
    with pytest.raises(UsageError, match=r"Leave 'num' out"):
        generator.generate("a", [0], num=2)


def test_images_are_saved_to_a_file_or_a_folder_and_overwrite_nothing(tmp_path: Path) -> None:
    generator = Generator(RecordingBackend(), "uniform", 2)
    one, two = generator.generate("a red circle"), generator.generate(["a", "b"])
    assert one.save(tmp_path / "one.png") == [tmp_path / "one.png"]
    assert [path.name for path in two.save(tmp_path / "new" / "folder")] == ["0001-a.png", "0002-b.png"]
    (picture,) = one.to_pil()
    with Image.open(tmp_path / "one.png") as saved:
        assert saved.tobytes() == picture.tobytes()
    before = (tmp_path / "one.png").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        one.save(tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() == before
    with pytest.raises(UsageError, match="2 images cannot go into the one file"):
        two.save(tmp_path / "two.png")
    with pytest.raises(StorageError, match="cannot be written"):
        one.save(tmp_path / "nowhere" / "one.jpg")


def test_images_show_themselves_on_one_line_and_in_a_notebook() -> None:
    drawn = Generator(RecordingBackend(), "uniform", 2).generate(["<b>", "b"])
    assert repr(drawn) == "Generated(2 images of 8 x 8 pixels)"
    page = drawn._repr_html_()
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;b&gt; (seed 0)" in page
    assert "<b> (seed" not in page
