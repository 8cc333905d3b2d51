from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fmg.core.errors import RewardError, UsageError
from fmg.core.types import PartialRewardOutput
from fmg.registry import rewards
from fmg.rewards.calls import CallError
from fmg.rewards.vlm_judge import final_score, yes_probability
from tests.support.web import Call, FakeServer, Handler, Script, fake_server

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog"]


def completion(text: str = "", top: dict[str, float] | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if top is not None:
        candidates = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        choice["logprobs"] = {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": candidates}]}
    return {"choices": [choice]}


def yes(handler: Handler, call: Call) -> None:
    handler.answer(completion(top={"Yes": 0.6, "No": 0.2}))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server(yes) as running:
        yield running


@pytest.fixture
def judge(server: FakeServer, tmp_path: Path) -> Any:
    def build(**options: object) -> Any:
        defaults = {"url": f"{server.url}/v1", "model": "m", "cache": str(tmp_path / "cache"), "image_size": 16}
        defaults["backoff"] = 0.01
        return rewards.build("vlm-judge", {**defaults, **options})

    return build


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"Yes": 0.6, "No": 0.2}, 0.75),
        ({"yes": 0.3, " Yes": 0.2, "YES": 0.1, "no": 0.2, "▁No": 0.2}, 0.6),
        ({"Ġyes": 0.5, "maybe": 0.5}, 1.0),
        ({"No": 0.9, "The": 0.1}, 0.0),
    ],
)
def test_yes_probability(top: dict[str, float], expected: float) -> None:
    assert yes_probability(completion(top=top)) == pytest.approx(expected)


@pytest.mark.parametrize("answer", [completion(top={"Maybe": 1.0}), completion("yes"), {}, {"choices": []}, None])
def test_answers_without_yes_or_no_are_failures(answer: object) -> None:
    with pytest.raises(CallError):
        yes_probability(answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Final Score: 4", 0.8), ("good.\nFinal Score:  3.5\n", 0.7), ("Final Score: 1 no, Final Score: **5**", 1.0)],
)
def test_final_score(text: str, expected: float) -> None:
    assert final_score(completion(text)) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "Score: 4", "Final Score: 0", "Final Score: 5.5", "Final Score: nan"])
def test_answers_without_a_score_are_failures(text: str) -> None:
    with pytest.raises(CallError, match="Final Score"):
        final_score(completion(text))


def test_the_request_holds_picture_prompt_and_key(
    server: FakeServer, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    output = judge(api_key_env="MY_KEY", image_size=32)(IMAGES[:1], ['a "{prompt}" cat'])
    assert output.total.tolist() == [pytest.approx(0.75)]
    (call,) = server.calls
    assert (call.path, call.headers["Authorization"]) == ("/v1/chat/completions", "Bearer sk-secret")
    request = json.loads(call.body)
    assert (request["temperature"], request["max_tokens"], request["logprobs"], request["top_logprobs"]) == (
        0,
        1,
        True,
        20,
    )
    picture, text = request["messages"][0]["content"]
    data = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert Image.open(BytesIO(base64.b64decode(data))).size == (32, 32)
    assert 'a "{prompt}" cat' in text["text"]


def test_score_mode_asks_for_text(server: FakeServer, judge: Any) -> None:
    server.respond = lambda handler, call: handler.answer(completion("fine\nFinal Score: 4"))
    output = judge(mode="score", instruction="Rate {prompt}.", max_tokens=99)(IMAGES, PROMPTS)
    assert output.total.tolist() == pytest.approx([0.8, 0.8])
    request = json.loads(server.calls[0].body)
    assert request["max_tokens"] == 99
    assert "logprobs" not in request


def test_answers_are_cached_on_disk_as_json(server: FakeServer, judge: Any, tmp_path: Path) -> None:
    first = judge()(IMAGES, PROMPTS).total
    assert len(server.calls) == 2
    assert torch.equal(judge()(IMAGES, PROMPTS).total, first)
    assert len(server.calls) == 2
    judge()(IMAGES, PROMPTS[::-1])
    judge(model="other")(IMAGES, PROMPTS)
    assert len(server.calls) == 6
    for file in (tmp_path / "cache").iterdir():
        assert json.loads(file.read_text())["score"] == pytest.approx(0.75)
        file.write_text("damaged")
    judge()(IMAGES, PROMPTS)
    assert len(server.calls) == 8


def test_temporary_failures_are_retried_and_each_answer_stays_with_its_picture(server: FakeServer, judge: Any) -> None:
    by_prompt = {f"prompt {i}": (i + 1) / 20 for i in range(12)}
    seen: set[bytes] = set()

    def respond(handler: Handler, call: Call) -> None:
        if call.body not in seen:
            seen.add(call.body)
            handler.answer({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"})
            return
        prompt = json.loads(call.body)["messages"][0]["content"][1]["text"]
        p = next(value for key, value in by_prompt.items() if f'"{key}"' in prompt)
        handler.answer(completion(top={"yes": p, "no": 1 - p}))

    server.respond = respond
    output = judge(concurrency=8)(torch.rand(12, 3, 8, 8), list(by_prompt))
    assert output.total.tolist() == pytest.approx(list(by_prompt.values()))
    assert len(server.calls) == 24


def test_a_failure_names_reward_and_prompt_and_never_the_key(
    server: FakeServer, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server.respond = lambda handler, call: handler.answer({"error": {"message": "bad key sk-secret"}}, 401)
    with pytest.raises(RewardError, match=r"vlm-judge.*'a cat'.*status 401: bad key") as caught:
        judge(api_key_env="MY_KEY", on_failure="drop-group")(IMAGES, PROMPTS)
    assert "sk-secret" not in str(caught.value)
    # an error that a retry cannot fix is requested once for each picture
    assert len(server.calls) <= 2


def test_drop_group_leaves_the_picture_without_a_score(server: FakeServer, judge: Any) -> None:
    def respond(handler: Handler, call: Call) -> None:
        if b"a cat" in call.body:
            handler.answer(completion(top={"Perhaps": 1.0}))
        else:
            yes(handler, call)

    server.respond = respond
    output = judge(on_failure="drop-group", retries=1)(IMAGES, PROMPTS)
    assert isinstance(output, PartialRewardOutput)
    assert output.scored.tolist() == [False, True]
    assert math.isnan(output.total[0])
    assert output.total[1] == 0.75


def test_the_timeout_bounds_a_call(server: FakeServer, judge: Any) -> None:
    def drip(handler: Handler, call: Call) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.02)

    server.respond = Script([drip, yes])
    assert judge(timeout=1.5)(IMAGES[:1], PROMPTS[:1]).total.item() == 0.75
    server.respond = drip
    with pytest.raises(RewardError, match=r"no answer within 0\.5 s"):
        judge(timeout=0.5, retries=0, model="other")(IMAGES[:1], PROMPTS[:1])


def test_a_missing_key_is_a_usage_error(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UsageError, match="NO_SUCH_KEY"):
        judge(api_key_env="NO_SUCH_KEY")


@pytest.mark.parametrize(
    "options",
    [
        {"url": "127.0.0.1:80"},
        {"url": "ftp://host"},
        {"url": "http://user:secret@host"},
        {"url": "http://host:99999"},
        {"instruction": "no place for the text"},
        {"timeout": 0},
        {"concurrency": 0},
        {"api_key_env": "sk-this is a key"},
    ],
)
def test_wrong_options_are_refused(judge: Any, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        judge(**options)
