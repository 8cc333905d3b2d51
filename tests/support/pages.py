"""Checks of self-contained HTML pages, and run folders to make pages of."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from fmg.core.machine import write_environment
from fmg.data.checkpoints import CheckpointIndex, SavedCheckpoint, write_index
from fmg.data.run_folder import RunFolder
from fmg.recipe import resolve

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """A parsed page: its text, its addresses and whether its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, tag
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        """All text with single blanks."""
        return " ".join(" ".join(self.text).split())


def self_contained(html: str) -> Page:
    """The page, after checking that it loads nothing, runs nothing and forbids both."""
    page = Page(html)
    assert all(address.startswith("data:image/") for address in page.addresses), page.addresses
    assert not {"script", "iframe", "object", "link", "form"} & set(page.tags)
    assert not page.handlers
    assert "default-src 'none'; img-src data:" in html
    return page


def made_up_run(folder: Path, *, lr: float = 1e-3, evaluations: int = 4, averaged: bool = False) -> RunFolder:
    """A finished run with known metrics: per iteration, the reward rises by 0.01 and strict by 0.02.

    With `averaged` the moving average is evaluated as well; once started it is 0.1 better, and it is kept.
    """
    run = RunFolder.create(folder, "meanflow-shapes")
    run.recipe.write_text(resolve(flags={"lr": lr}).to_yaml(), encoding="utf-8")
    write_environment(run.path)
    for iteration in range(evaluations):
        if iteration:
            reward = {"reward/mean": 0.5 + 0.01 * iteration, "reward/se": 0.01, "approx_kl": 1e-4, "clip_frac": 0.1}
            times = {"time/rollout_s": 1.0, "time/update_s": 3.0, "time/iteration_s": 4.0}
            run.append_metrics({"iteration": iteration, **reward, **times})
        scores = {
            "eval/shapes_mean": 0.7,
            "eval/shapes_se": 0.01,
            "eval/shapes_color_mean": 0.6,
            "eval/shapes_color_se": 0.02,
            "eval/shapes_strict_mean": 0.3 + 0.02 * iteration,
            "eval/shapes_strict_se": 0.004,
        }
        if averaged:
            ahead = 0.1 * (iteration > 0)
            scores |= {
                key.replace("eval/", "eval_ema/"): value + ahead * key.endswith("_mean")
                for key, value in scores.items()
            } | {"eval_ema/score": 0.7 + iteration, "eval_ema/score_se": 0.1}
        line = {"iteration": iteration, **scores, "eval/score": 0.7 + iteration, "eval/score_se": 0.1}
        run.append_metrics({**line, "time/eval_s": 2.0})
        pixels = np.random.default_rng(iteration).integers(0, 255, (300, 900, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(run.samples / f"iteration-{iteration:04d}.png")
    Image.fromarray(pixels).save(run.before_after)
    end, key = ("-ema", "eval_ema/score") if averaged else ("", "eval/score")
    best, last = (SavedCheckpoint(f"checkpoint-{n}{end}", n, key, 0.7 + n) for n in (1, evaluations - 1))
    for saved in (best, last):
        (run.checkpoints / saved.name).mkdir()
    write_index(run.path, CheckpointIndex((best, last), best.name, last.name))
    run.set_state("finished")
    return run
