from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch

from fmg.core.errors import FmgError, RewardError, UsageError
from fmg.core.types import PartialRewardOutput, RewardOutput
from fmg.registry import rewards
from fmg.rewards.base import Mixture, checked, complete_groups, select_rows
from fmg.rewards.calls import CallError, RetryPolicy
from fmg.rewards.service.wire import decode_request
from fmg.rl import group_advantages
from tests.support.web import Call, FakeServer, Handler, Script, fake_server

INFO = {"rewards": {"brightness": {"probe_prompt": "p"}}, "limits": {"max_images": 64}}
LIMITS = {"max_images": 1000, "max_pixels": 10**6}


def brightness(call: Call) -> dict[str, Any]:
    means = decode_request(call.body, **LIMITS).images.mean((1, 2, 3)).tolist()
    return {"scores": {"brightness": {"total": means, "parts": {"half": [m / 2 for m in means]}}}}


def good(handler: Handler, call: Call) -> None:
    handler.answer(INFO if call.path == "/info" else brightness(call))


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Handler, Call], None]:
    def respond(handler: Handler, call: Call) -> None:
        answer = brightness(call)
        change(answer["scores"]["brightness"])
        handler.answer(answer)

    return respond


def slow(handler: Handler, call: Call) -> None:
    time.sleep(2.5)


def unavailable(handler: Handler, call: Call) -> None:
    handler.answer({"error": {"what": "The queue is full", "fix": "Later."}}, 503, {"Retry-After": "0"})


def broken_off(handler: Handler, call: Call) -> None:
    handler.answer(b"{}", headers={"Content-Length": "100"})
    handler.close_connection = True


FAULTS = {
    "slow": slow,
    "500": lambda handler, call: handler.answer({"error": {"what": "It failed", "fix": "Mend it."}}, 500),
    "503": unavailable,
    "reset": lambda handler, call: handler.reset(),
    "broken off": broken_off,
    "NaN": edited(lambda scores: scores["total"].__setitem__(0, math.nan)),
    "infinite part": edited(lambda scores: scores["parts"]["half"].__setitem__(0, math.inf)),
    "too few": edited(lambda scores: scores["total"].pop()),
    "too many": edited(lambda scores: scores["total"].append(0.0)),
    "wrong shape": edited(lambda scores: scores.update(total=[scores["total"]])),
    "text": edited(lambda scores: scores.update(total=["1.0"] * len(scores["total"]))),
    "not JSON": lambda handler, call: handler.answer(b"<html>"),
    "empty": lambda handler, call: handler.answer({}),
}

IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "a", "b", "b", "c", "c"]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server(good) as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Callable[..., Any]:
    def build(**options: object) -> Any:
        defaults = {"url": server.url, "backoff": 0.01, "timeout": 20.0, "retries": 2, "batch_size": 2}
        return rewards.build("remote", {**defaults, **options})

    return build


@pytest.mark.parametrize("transport", ["tensor", "bytes", "png"])
def test_scores_and_parts(client: Any, transport: str) -> None:
    output = checked("remote", client(transport=transport, weights={"brightness": 2.0}))(IMAGES, PROMPTS)
    expected = IMAGES.mean((1, 2, 3))
    tolerance = 1e-6 if transport == "tensor" else 0.5 / 255
    torch.testing.assert_close(output.total, 2 * expected, atol=2 * tolerance, rtol=0)
    torch.testing.assert_close(output.parts["brightness"], expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(output.parts["brightness/half"], expected / 2, atol=tolerance, rtol=0)


def test_the_server_is_probed_at_the_start(client: Any, server: FakeServer) -> None:
    client()
    assert [(call.method, call.path) for call in server.calls] == [("GET", "/info"), ("POST", "/score")]
    sent = decode_request(server.calls[1].body, **LIMITS)
    assert (sent.prompts, sent.rewards, tuple(sent.images.shape)) == (("p",), ("brightness",), (1, 3, 32, 32))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_temporary_fault_is_retried(fault: str, client: Any, server: FakeServer) -> None:
    reward = client(**({"timeout": 1.5} if fault == "slow" else {}))
    server.respond = Script([FAULTS[fault], good])
    output = reward(IMAGES[:2], PROMPTS[:2])
    torch.testing.assert_close(output.total, IMAGES[:2].mean((1, 2, 3)), atol=1e-6, rtol=0)
    first, second = server.calls[-2:]
    assert first.body == second.body


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_stops_and_names_reward_and_prompt(fault: str, client: Any, server: FakeServer) -> None:
    reward = client(retries=1, **({"timeout": 0.5} if fault == "slow" else {}))
    server.respond = FAULTS[fault]
    began, calls = time.monotonic(), len(server.calls)
    with pytest.raises(RewardError, match="'remote' has no score for the prompt 'a': "):
        reward(IMAGES[:2], PROMPTS[:2])
    assert len(server.calls) - calls == 2
    assert time.monotonic() - began < 15


def test_a_refused_request_is_not_repeated(client: Any, server: FakeServer) -> None:
    reward = client(on_failure="drop-group")
    server.respond = lambda handler, call: handler.answer({"error": {"what": "No text", "fix": "Quote one."}}, 422)
    calls = len(server.calls)
    with pytest.raises(RewardError, match=r"status 422: No text Quote one\."):
        reward(IMAGES[:2], PROMPTS[:2])
    assert len(server.calls) - calls == 1


def fails_for_b(handler: Handler, call: Call) -> None:
    if "b" in decode_request(call.body, **LIMITS).prompts:
        handler.answer({}, 500)
    else:
        good(handler, call)


def test_drop_group_keeps_the_groups_that_were_scored(client: Any, server: FakeServer) -> None:
    mixture = Mixture([("remote", client(on_failure="drop-group"), 1.0), ("red", Red(), 1.0)])
    server.respond = fails_for_b
    output = mixture(IMAGES, PROMPTS)
    assert isinstance(output, PartialRewardOutput)
    assert output.scored.tolist() == [True, True, False, False, True, True]
    assert output.total.isnan().tolist() == [False, False, True, True, False, False]

    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    kept = complete_groups(output, groups)
    assert kept.tolist() == output.scored.tolist()
    advantages = group_advantages(select_rows(output, kept).total, groups[kept], global_std=True)
    assert torch.isfinite(advantages).all()
    # code that does not expect missing scores gets an error, not a zero
    with pytest.raises(RewardError, match="not finite"):
        group_advantages(output.total, groups, global_std=True)


def test_a_group_with_one_gap_is_left_out_completely(client: Any, server: FakeServer) -> None:
    reward = client(on_failure="drop-group", batch_size=1, retries=0, concurrency=1)
    server.respond = Script([good, FAULTS["500"], good])
    output = checked("remote", reward).score(IMAGES, PROMPTS)
    assert isinstance(output, PartialRewardOutput)
    assert output.scored.tolist() == [True, False, True, True, True, True]
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    kept = complete_groups(output, groups)
    assert kept.tolist() == [False, False, True, True, True, True]
    with pytest.raises(ValueError, match="without a score"):
        select_rows(output, torch.ones(6, dtype=torch.bool))


def test_evaluation_never_continues_without_a_score(client: Any, server: FakeServer) -> None:
    reward = checked("remote", client(on_failure="drop-group"))
    server.respond = fails_for_b
    with pytest.raises(RewardError, match="'b'"):
        reward(IMAGES, PROMPTS)


def test_patience_with_a_dead_server_is_limited(client: Any, server: FakeServer) -> None:
    reward = client(on_failure="drop-group", patience=3, retries=0)
    server.respond = FAULTS["500"]
    for _ in range(2):
        output = reward(IMAGES, PROMPTS)
        assert isinstance(output, PartialRewardOutput)
        assert not output.scored.any()
    server.respond = good
    assert type(reward(IMAGES, PROMPTS)) is RewardOutput
    server.respond = FAULTS["500"]
    for _ in range(2):
        reward(IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="status 500"):
        reward(IMAGES, PROMPTS)


def test_large_batches_are_split_as_the_server_wants(client: Any, server: FakeServer) -> None:
    server.respond = lambda h, c: h.answer(
        {**INFO, "limits": {"max_images": 4}} if c.path == "/info" else brightness(c)
    )
    reward = client(batch_size=100)
    calls = len(server.calls)
    images = torch.rand(10, 3, 4, 4)
    torch.testing.assert_close(reward(images, ["p"] * 10).total, images.mean((1, 2, 3)))
    assert sorted(len(decode_request(c.body, **LIMITS).prompts) for c in server.calls[calls:]) == [2, 4, 4]


def test_the_token_is_sent(client: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "tell-nobody")
    client(token_env="MY_TOKEN")
    assert {call.headers["Authorization"] for call in server.calls} == {"Bearer tell-nobody"}


@pytest.mark.parametrize(
    ("info", "options", "message"),
    [
        ({"rewards": {}, "limits": {"max_images": 1}}, {}, "serves the rewards none"),
        ({"rewards": {n: {"probe_prompt": ""} for n in "ab"}, "limits": {"max_images": 1}}, {}, "rewards a, b"),
        (INFO, {"weights": {"brightnes": 1.0}}, "Did you mean 'brightness'"),
        ({"hello": "world"}, {}, "not a reward server"),
        ([], {}, "not a reward server"),
        ({**INFO, "limits": {"max_images": 0}}, {}, "not a reward server"),
    ],
)
def test_what_the_server_has_is_checked_at_the_start(
    info: object, options: dict[str, object], message: str, client: Any, server: FakeServer
) -> None:
    server.respond = lambda handler, call: handler.answer(info)
    with pytest.raises(FmgError, match=message):
        client(**options)


def test_no_server_is_one_readable_line_after_bounded_attempts(client: Any, server: FakeServer) -> None:
    server.server_close()
    with pytest.raises(RewardError, match=r"does not answer: the connection was refused\. Start it with") as caught:
        client(retries=2)
    assert "\n" not in str(caught.value)


def failing(*errors: CallError) -> Callable[[], str]:
    left = iter(errors)

    def attempt() -> str:
        error = next(left, None)
        if error is not None:
            raise error
        return "done"

    return attempt


def test_waits_double_up_to_a_limit() -> None:
    waits: list[float] = []
    attempt = failing(*[CallError("x", passing=True)] * 5)
    assert RetryPolicy(retries=5, backoff=1.0, max_backoff=6.0).run(attempt, waits.append) == "done"
    assert all(low <= wait <= high for wait, low, high in zip(waits, (0.5, 1, 2, 4, 6), (1, 2, 4, 6, 6), strict=True))


def test_waits_follow_the_server_up_to_a_limit() -> None:
    waits: list[float] = []
    attempt = failing(*[CallError("x", passing=True, retry_after=seconds) for seconds in (3.0, 7.0)])
    RetryPolicy(retries=2, backoff=0.001, max_backoff=6.0).run(attempt, waits.append)
    assert waits == [3.0, 6.0]


class Red:
    """The mean of the first channel."""

    def __call__(self, images: torch.Tensor, prompts: object) -> RewardOutput:
        return RewardOutput(images[:, 0].mean((1, 2)), {})


@pytest.mark.parametrize(
    ("transport", "dtype"), [("tensor", torch.float32), ("bytes", torch.uint8), ("png", torch.uint8)]
)
def test_the_request_is_safetensors_and_nothing_else(
    transport: str, dtype: torch.dtype, client: Any, server: FakeServer
) -> None:
    client(transport=transport)
    sent = safetensors.torch.load(server.calls[-1].body)
    assert {name: tensor.dtype for name, tensor in sent.items()} == {"images": dtype}


def test_an_unset_token_is_allowed_but_an_invalid_one_is_an_error(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "line\nbreak")
    with pytest.raises(UsageError, match="MY_TOKEN"):
        client(token_env="MY_TOKEN")
