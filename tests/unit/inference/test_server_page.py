"""The page of the image server in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape

import pytest

pytest.importorskip("prometheus_client", reason="needs the packages of flow-map-grpo[server]")

from tests.support.browser import CHROMIUM, Tab, browser
from tests.support.image_service import Patterns, image_service, served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium (apt-get install chromium)"),
]

MARKUP = "<img src=x onerror=\"document.title='owned'\"> & <b>bold</b>"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def submit(tab: Tab, **values: object) -> None:
    """Fills the form and generates."""
    before = tab.run("document.querySelectorAll('article').length")
    for name, value in values.items():
        tab.run(f"byId({json.dumps(name)}).value = {json.dumps(str(value))}")
    tab.run("byId('generate').click()")
    tab.wait(f"document.querySelectorAll('article').length > {before} && !byId('generate').disabled")


@pytest.mark.parametrize("width", [1280, 420])
def test_two_models_side_by_side(tab: Tab, width: int) -> None:
    with image_service(served(Patterns(32), "before"), served(Patterns(32), "after", steps=2)) as server:
        tab.events.clear()
        tab.open(f"{server.url}/", width)
        tab.wait("byId('model').options.length === 2")
        assert not tab.run("byId('token').checkVisibility()")
        submit(tab, prompt=MARKUP, model="after", other="before", seed=3)
        assert tab.run("document.title") == "fmg: image server"
        assert escape(MARKUP, quote=False) in tab.run("document.querySelector('article p').innerHTML")
        assert "seed 3, 4 and 2 steps" in tab.run("document.querySelector('article p').textContent")
        captions = tab.run("[...document.querySelectorAll('article figcaption')].map(c => c.innerText)")
        assert [caption.split(":")[0] for caption in captions] == ["before", "after"]
        assert all(" ms\ngenerating " in caption for caption in captions)
        # every picture is shown, beside the other, and the page is not wider than the window
        assert tab.run("[...document.images].every(image => image.naturalWidth === 32)")
        first, second = tab.run("[...document.images].map(image => image.getBoundingClientRect().toJSON())")
        assert first["y"] == second["y"]
        assert first["right"] < second["left"]
        assert tab.run("document.documentElement.scrollWidth") <= width
        tab.run("byId('next').click()")
        submit(tab)
        assert "seed 4," in tab.run("document.querySelector('article p').textContent")
        assert tab.complaints() == []


def test_errors_are_shown_and_the_page_stays_usable(tab: Tab) -> None:
    with image_service(served(Patterns(32))) as server:
        tab.open(f"{server.url}/")
        tab.wait("byId('model').options.length === 1")
        tab.run("byId('prompt').value = 'bad'; byId('generate').click()")
        tab.wait("byId('status').className === 'error'")
        assert tab.run("byId('status').textContent") == "The prompt is bad. Write a good one."
        submit(tab, prompt="good")
        assert tab.run("byId('status').textContent") == ""
        submit(tab, prompt="long one")
        assert tab.run("byId('status').textContent") == "The prompt is long."


def test_a_token_is_asked_for_when_the_server_needs_one(tab: Tab) -> None:
    with image_service(served(Patterns(32)), token="secret") as server:
        tab.open(f"{server.url}/")
        tab.wait("byId('token').checkVisibility()")
        tab.wait("byId('status').textContent.includes('token is missing')")
        tab.run("byId('token').value = 'secret'; byId('token').dispatchEvent(new Event('change'))")
        tab.wait("byId('model').options.length === 1")
        submit(tab, prompt="a")
