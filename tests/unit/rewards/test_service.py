from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import safetensors.torch
import torch

from fmg.core.errors import UsageError
from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.base import build_rewards, checked, reward_refs
from fmg.rewards.service.batching import Batcher, BusyError, Limits
from fmg.rewards.service.wire import (
    SAFETENSORS,
    ScoreRequest,
    decode_request,
    decode_scores,
    encode_request,
    encode_scores,
    probe_image,
)
from tests.support.reward_service import Brightness, call, reward_service
from tests.tiny_rewards import write_deqa

pytest.importorskip("fastapi", reason="needs the packages of flow-map-grpo[server]")

LIMITS = {"max_images": 8, "max_pixels": 4096}
IMAGES = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
REQUEST = ScoreRequest(IMAGES, ("1", "2", "Ünicode “quoted” 漢字 🎉"), ("brightness",))


@pytest.fixture(scope="module")
def brightness() -> Brightness:
    return Brightness()


@pytest.fixture(scope="module")
def url(brightness: Brightness) -> Iterator[str]:
    jpeg = rewards.build("jpeg-incompressibility")
    limits = {"max_images": 64, "max_pixels": 4096, "max_body": 1 << 20, "timeout": 30.0}
    with reward_service({"brightness": brightness, "jpeg": jpeg}, **limits) as server:
        yield server.url


def request_body(count: int = 1, prompts: list[str] | None = None, **more: object) -> bytes:
    request = json.dumps({"prompts": prompts or ["p"] * count, **more})
    return safetensors.torch.save({"images": torch.zeros(count, 3, 4, 4)}, {"request": request})


def score(url: str, body: bytes, content_type: str = SAFETENSORS, **headers: str) -> tuple[int, Any, dict[str, str]]:
    status, received, content = call(url, "POST", "/score", body, {"Content-Type": content_type, **headers})
    return status, json.loads(content), received


# --- the wire


def test_tensors_come_back_bit_for_bit() -> None:
    decoded = decode_request(encode_request(REQUEST), **LIMITS)
    assert torch.equal(decoded.images, IMAGES)
    assert (decoded.prompts, decoded.rewards) == (REQUEST.prompts, REQUEST.rewards)


def test_inexact_images_come_back_as_rounded_to_8_bits() -> None:
    body = encode_request(REQUEST, exact=False)
    decoded = decode_request(body, **LIMITS)
    assert len(body) < len(encode_request(REQUEST))
    assert torch.equal(decoded.images, (IMAGES * 255).round() / 255)
    assert decoded.prompts == REQUEST.prompts


def test_scores_come_back_bit_for_bit() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.randint(-30, 30, (1000,))
    text = json.dumps(encode_scores({"r": RewardOutput(values, {"part": -values})}))
    back = decode_scores(json.loads(text), ["r"], 1000)["r"]
    assert torch.equal(back.total, values)
    assert torch.equal(back.parts["part"], -values)


def tensors(images: torch.Tensor, request: str | None = '{"prompts": ["a"]}', name: str = "images") -> bytes:
    return safetensors.torch.save({name: images}, None if request is None else {"request": request})


WRONG_TENSORS = {
    "empty": b"",
    "garbage": b"\x80\x04\x95" * 100,
    "huge header": (1 << 60).to_bytes(8, "little") + b"{}",
    "nested header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "no request": tensors(torch.rand(1, 3, 4, 4), None),
    "request is no JSON": tensors(torch.rand(1, 3, 4, 4), "nothing"),
    "request is no object": tensors(torch.rand(1, 3, 4, 4), "[1]"),
    "nested request": tensors(torch.rand(1, 3, 4, 4), "[" * 100_000),
    "no prompts": tensors(torch.rand(0, 3, 4, 4), '{"prompts": []}'),
    "unknown key": tensors(torch.rand(1, 3, 4, 4), '{"prompts": ["a"], "code": "import os"}'),
    "prompt is a number": tensors(torch.rand(1, 3, 4, 4), '{"prompts": [1]}'),
    "endless prompt": tensors(torch.rand(1, 3, 4, 4), json.dumps({"prompts": ["x" * 200_000]})),
    "other tensor": tensors(torch.rand(1, 3, 4, 4), name="x"),
    "channels": tensors(torch.rand(1, 4, 4, 4)),
    "rank": tensors(torch.rand(3, 4, 4)),
    "integers": tensors(torch.zeros(1, 3, 4, 4, dtype=torch.int64)),
    "NaN": tensors(torch.full((1, 3, 4, 4), torch.nan)),
    "above 1": tensors(torch.full((1, 3, 4, 4), 1.1)),
    "counts differ": tensors(torch.rand(2, 3, 4, 4)),
    "no pixels": tensors(torch.rand(1, 3, 0, 4)),
    "too many pixels": tensors(torch.rand(1, 3, 65, 64)),
    "too many images": tensors(torch.rand(9, 3, 4, 4), json.dumps({"prompts": ["a"] * 9})),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_safetensors_are_refused(case: str) -> None:
    with pytest.raises(UsageError):
        decode_request(WRONG_TENSORS[case], **LIMITS)


@pytest.mark.parametrize("case", ["request is no JSON", "request is no object", "nested request"])
def test_a_request_that_is_not_an_object_gets_an_error_of_the_service(case: str) -> None:
    with pytest.raises(UsageError) as refused:
        decode_request(WRONG_TENSORS[case], **LIMITS)
    assert refused.value.fix.startswith("Send one JSON object")


def test_bytes_are_accepted_as_tensors() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert decode_request(tensors(levels), **LIMITS).images.flatten().tolist() == pytest.approx([0, 0.2, 1])


def test_the_probe_image_is_a_picture() -> None:
    image = probe_image()
    assert image.shape == (1, 3, 32, 32)
    assert image.min() == 0
    assert image.max() == 1


# --- batches


def test_requests_become_batches_and_scores_return_to_their_requests() -> None:
    reward = Brightness()
    reward.gate.clear()
    batcher = Batcher({"b": checked("b", reward)}, Limits(max_batch=6), torch.device("cpu"))
    requests = [ScoreRequest(torch.full((2, 3, 2, 2), i / 10), (str(i), str(i)), ()) for i in range(6)]
    futures = [batcher.submit(request) for request in requests]
    reward.gate.set()
    for i, future in enumerate(futures):
        assert future.result(30)["b"].total.tolist() == pytest.approx([i + i / 10] * 2)
    batcher.close()
    assert sum(reward.batches) == 12
    assert max(reward.batches) <= 6
    assert len(reward.batches) < 6
    assert batcher.queued == 0


def test_requests_of_other_sizes_are_not_mixed() -> None:
    reward = Brightness()
    reward.gate.clear()
    batcher = Batcher({"b": checked("b", reward)}, Limits(), torch.device("cpu"))
    futures = [batcher.submit(ScoreRequest(torch.ones(1, 3, 2, width), ("0",), ())) for width in (2, 3, 2)]
    reward.gate.set()
    assert [future.result(30)["b"].total.item() for future in futures] == [1, 1, 1]
    batcher.close()
    assert reward.batches == [1, 1, 1]


def test_one_bad_request_does_not_fail_its_batch() -> None:
    reward = Brightness()
    reward.gate.clear()
    batcher = Batcher({"b": checked("b", reward)}, Limits(), torch.device("cpu"))
    prompts = ["first", "good", "bad", "break", "7"]
    futures = [batcher.submit(ScoreRequest(torch.zeros(1, 3, 2, 2), (prompt,), ())) for prompt in prompts]
    reward.gate.set()
    assert futures[1].result(30)["b"].total.item() == 0
    assert futures[4].result(30)["b"].total.item() == 7
    assert isinstance(futures[2].exception(30), UsageError)
    assert "out of order" in str(futures[3].exception(30))
    batcher.close()


def test_a_full_queue_refuses_and_a_cancelled_request_is_not_scored() -> None:
    reward = Brightness()
    reward.gate.clear()
    batcher = Batcher({"b": checked("b", reward)}, Limits(max_queued=4, max_batch=1), torch.device("cpu"))
    pair = ScoreRequest(torch.zeros(2, 3, 2, 2), ("0", "0"), ())
    first, second = batcher.submit(pair), batcher.submit(pair)
    with pytest.raises(BusyError) as caught:
        batcher.submit(pair)
    assert caught.value.retry_after >= 1
    while not first.running():
        time.sleep(0.01)
    assert second.cancel()
    reward.gate.set()
    first.result(30)
    batcher.close()
    assert reward.batches == [2]
    with pytest.raises(BusyError):
        batcher.submit(pair)


# --- over HTTP


def test_health_and_info(url: str) -> None:
    assert json.loads(call(url, "GET", "/health")[2]) == {"status": "ok", "queued": 0}
    info = json.loads(call(url, "GET", "/info")[2])
    assert set(info["rewards"]) == {"brightness", "jpeg"}
    assert info["limits"]["max_images"] == 64


def test_every_file_of_a_folder_of_weights_is_listed(tmp_path: Path) -> None:
    from fmg.rewards.service.server import describe

    folder = write_deqa(tmp_path).folder
    (reference,) = reward_refs([{"name": "deqa", "weights": str(folder)}])
    info = describe(build_rewards([reference]), [reference], torch.device("cpu"))
    shards = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))]
    listed: Any = info["rewards"]
    assert [entry["sha256"] for entry in listed["deqa"]["weights"]] == shards


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/openapi.json", "/score"])
def test_nothing_else_is_served(path: str, url: str) -> None:
    status, _, content = call(url, "GET", path)
    assert status in (404, 405)
    assert sorted(json.loads(content)["error"]) == ["fix", "what"]


def test_a_malformed_request_is_refused_in_json_and_without_a_word_in_the_log(
    url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.settimeout(30)
        connection.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        head, _, content = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert sorted(json.loads(content)["error"]) == ["fix", "what"]
    assert capfd.readouterr().err == ""


def received(connection: socket.socket) -> bytes:
    """Everything that a connection receives until the server closes it."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            content += chunk
    return content


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        b"POST /score HTTP/1.1\r\nHost: x\r\n",
        # an answer ends the wait for a body that is not read any more
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\n",
        # the second request of a connection
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nPOST /score HTTP/1.1\r\n",
    ],
)
def test_a_connection_without_a_whole_request_is_closed(opening: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmg.serving.server._HEADERS_S", 0.3)
    with reward_service({"b": Brightness()}) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.settimeout(30)
            connection.sendall(opening)
            received(connection)
        assert call(server.url, "GET", "/health")[0] == 200


def test_clients_that_hold_connections_open_shut_out_only_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmg.serving import server as module

    monkeypatch.setattr(module, "_descriptors", lambda: 64)
    with reward_service({"b": Brightness()}) as server, contextlib.ExitStack() as stack:
        parts = urlsplit(server.url)
        held = []
        for _ in range(100):
            connection = stack.enter_context(socket.create_connection((parts.hostname, parts.port)))
            connection.settimeout(30)
            connection.sendall(b"POST /score HTTP/1.1\r\n")
            held.append(connection)
            if len(held) % 10 == 0:
                assert call(server.url, "GET", "/health")[0] == 200
        # the first were closed long before their time
        assert all(received(connection) == b"" for connection in held[:60])
        assert score(server.url, request_body(1, ["1"]))[0] == 200


def test_too_many_requests_are_told_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmg.serving import server as module

    monkeypatch.setattr(module, "_descriptors", lambda: 2)
    arrived = threading.Event()
    reward = Brightness()
    reward.gate.clear()

    def held(images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        arrived.set()
        return reward(images, prompts)

    with reward_service({"b": held}) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(score, server.url, request_body())
        assert arrived.wait(30)
        status, _, content = call(server.url, "GET", "/health")
        assert status == 503
        assert sorted(json.loads(content)["error"]) == ["fix", "what"]
        reward.gate.set()
        assert first.result()[0] == 200


def test_a_picture_that_a_reward_refuses_is_reported_as_such() -> None:
    with reward_service({"shapes": rewards.build("shapes")}) as server:
        status, answer, _ = score(server.url, request_body(1, ["a red circle"]))
    assert (status, "32 x 32" in answer["error"]["what"]) == (422, True)


def test_both_encodings_score_as_in_process(url: str) -> None:
    images = (torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    request = ScoreRequest(images, ("1", "2", "3", "4"), ())
    expected = {
        "brightness": Brightness()(images, request.prompts).total,
        "jpeg": rewards.build("jpeg-incompressibility")(images, request.prompts).total,
    }
    for exact in (True, False):
        status, answer, _ = score(url, encode_request(request, exact=exact))
        assert status == 200
        scores = decode_scores(answer, list(expected), 4)
        assert all(torch.equal(scores[name].total, total) for name, total in expected.items())


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"x", SAFETENSORS, 400),
        (request_body(rewards=["brightnes"]), SAFETENSORS, 400),
        (request_body(), "text/plain", 415),
        (b'{"images": ["aaaa"], "prompts": ["a"]}', "application/json", 415),
        (request_body(), "application/x-pickle", 415),
        (request_body(), "", 415),
        (b" " * ((1 << 20) + 1), SAFETENSORS, 413),
        (request_body(1, ["bad"], rewards=["brightness"]), SAFETENSORS, 422),
        (request_body(1, ["break"], rewards=["brightness"]), SAFETENSORS, 500),
    ],
)
def test_refusals_say_what_and_what_to_do(body: bytes, content_type: str, status: int, url: str) -> None:
    got, answer, _ = score(url, body, content_type)
    assert got == status
    assert sorted(answer["error"]) == ["fix", "what"]
    assert all(answer["error"].values())


def test_a_body_without_a_length_is_limited_as_well(url: str) -> None:
    # http.client sends an iterator in chunks, without a Content-Length
    chunks = iter([b" " * (1 << 19)] * 2 + [b" "])
    assert call(url, "POST", "/score", chunks, {"Content-Type": SAFETENSORS})[0] == 413


def test_a_client_that_hangs_up_does_not_disturb_the_server(url: str) -> None:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-safetensors\r\nContent-Length: 9\r\n\r\n{"
        )
    assert score(url, request_body(1, ["1"]))[0] == 200


def test_back_pressure_says_when_to_retry() -> None:
    reward = Brightness()
    reward.gate.clear()
    with reward_service({"b": reward}, max_queued=2) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(score, server.url, request_body(2))
        while json.loads(call(server.url, "GET", "/health")[2])["queued"] < 2:
            time.sleep(0.01)
        status, answer, headers = score(server.url, request_body())
        assert (status, answer["error"]["what"]) == (503, "The queue is full")
        assert int(headers["retry-after"]) >= 1
        reward.gate.set()
        assert first.result()[0] == 200


def test_scoring_that_takes_too_long_is_an_answer_too() -> None:
    reward = Brightness()
    reward.gate.clear()
    with reward_service({"b": reward}, timeout=0.2) as server:
        assert score(server.url, request_body())[0] == 504
        reward.gate.set()


def test_a_body_that_arrives_too_slowly_is_refused() -> None:
    def body() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1.5)
        yield b"}"

    with reward_service({"b": Brightness()}, timeout=0.3) as server:
        assert call(server.url, "POST", "/score", body(), {"Content-Type": SAFETENSORS})[0] == 408


def test_the_token_opens_everything_but_health() -> None:
    with reward_service({"b": Brightness()}, token="secret") as server:
        assert call(server.url, "GET", "/health")[0] == 200
        assert call(server.url, "GET", "/info")[0] == 401
        for wrong in ("secret", "Bearer", "Bearer secre", "Bearer sécret", "Basic secret"):
            assert score(server.url, request_body(), Authorization=wrong)[0] == 401
        assert score(server.url, request_body(), Authorization="Bearer secret")[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_addresses_than_loopback_need_a_token(host: str) -> None:
    from fmg.rewards.service.server import RewardServer

    with pytest.raises(UsageError, match="no token"):
        RewardServer({}, {}, host=host, port=0, limits=Limits(), token=None, device=torch.device("cpu"))


def test_a_taken_port_is_one_line(url: str) -> None:
    from fmg.rewards.service.server import RewardServer

    port = int(url.rpartition(":")[2])
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
        RewardServer({}, {}, host="127.0.0.1", port=port, limits=Limits(), token=None, device=torch.device("cpu"))


def test_fifty_clients_at_once_get_their_own_scores(url: str, brightness: Brightness) -> None:
    brightness.batches.clear()
    barrier = threading.Barrier(50)

    def client(number: int) -> list[float]:
        images = torch.full((2, 3, 4, 4), number / 100)
        body = encode_request(ScoreRequest(images, (str(number), str(number + 100)), ("brightness",)))
        barrier.wait(60)
        received = []
        for _ in range(3):
            status, answer, _ = score(url, body, SAFETENSORS)
            assert status == 200
            received += answer["scores"]["brightness"]["total"]
        return received

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(client, range(50)))
    for number, received in enumerate(results):
        assert received == pytest.approx([number * 1.01, number * 1.01 + 100] * 3)
    # nothing was scored twice or left out, and clients shared batches
    assert sum(brightness.batches) == 300
    assert len(brightness.batches) < 150
