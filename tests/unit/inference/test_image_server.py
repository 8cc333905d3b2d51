from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="needs the packages of flow-map-grpo[server]")

from fmg.core.errors import UsageError
from fmg.core.events import ignore
from fmg.inference import load
from fmg.inference.service.opening import Named, former_names, named_targets, open_models
from fmg.inference.target import Target
from fmg.recipe import Recipe
from fmg.serving.access import check_token, names_loopback
from fmg.serving.server import Address
from tests.support.image_service import Patterns, expected, image_service, pixels, post, served
from tests.support.reward_service import call


@pytest.fixture(scope="module")
def backend() -> Patterns:
    return Patterns()


@pytest.fixture(scope="module")
def url(backend: Patterns) -> Iterator[str]:
    with image_service(served(backend), served(Patterns(16), "large"), max_body=1 << 16) as server:
        yield server.url


def get(url: str, path: str, **headers: str) -> tuple[int, Any]:
    status, _, content = call(url, "GET", path, None, headers)
    return status, json.loads(content)


def test_images_of_one_prompt_have_consecutive_seeds(url: str) -> None:
    status, headers, answer = post(url, {"prompt": "a red circle", "n": 3, "seed": 7})
    assert (status, headers["content-type"]) == (200, "application/json")
    assert [entry["seed"] for entry in answer["data"]] == [7, 8, 9]
    for entry in answer["data"]:
        assert np.array_equal(pixels(entry), expected("a red circle", entry["seed"]))
    assert {key: answer[key] for key in ("model", "size", "steps", "output_format")} == {
        "model": "patterns",
        "size": "8x8",
        "steps": 4,
        "output_format": "png",
    }
    assert set(answer["timings_ms"]) == {"queued", "generated"}


def test_without_a_seed_the_answer_says_which_was_taken(url: str) -> None:
    (first,), (second,) = (post(url, {"prompt": "p"})[2]["data"] for _ in range(2))
    assert first["seed"] != second["seed"]
    assert np.array_equal(pixels(first), expected("p", first["seed"]))


def test_the_model_steps_and_format_are_those_of_the_request(url: str) -> None:
    request = {"prompt": "p", "model": "large", "steps": 2, "output_format": "webp", "size": "16x16", "n": None}
    status, _, answer = post(url, {**request, "user": "me", "quality": "auto"})
    assert status == 200
    assert (answer["steps"], answer["size"], answer["model"]) == (2, "16x16", "large")
    assert pixels(answer["data"][0]).shape == (16, 16, 3)


def test_a_truncated_prompt_is_reported(url: str) -> None:
    assert post(url, {"prompt": "long one"})[2]["warnings"] == ["The prompt is long."]
    assert "warnings" not in post(url, {"prompt": "one"})[2]


WRONG = {
    "no JSON": (b"nothing", None),
    "empty": (b"", None),
    "a list": (b"[]", None),
    "nested": (b"[" * 60_000, None),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', None),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', None),
    "not UTF-8": (b'{"prompt": "\xff"}', None),
    "NaN": (b'{"prompt": "a", "seed": NaN}', None),
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "blank prompt": ({"prompt": " \u200b\n"}, "prompt"),
    "prompt is a list": ({"prompt": ["a"]}, "prompt"),
    "huge prompt": ({"prompt": "x" * 4001}, "prompt"),
    "no image": ({"prompt": "a", "n": 0}, "n"),
    "a million images": ({"prompt": "a", "n": 10**6}, "n"),
    "n is a text": ({"prompt": "a", "n": "2"}, "n"),
    "n is true": ({"prompt": "a", "n": True}, "n"),
    "other size": ({"prompt": "a", "size": "1024x1024"}, "size"),
    "size is no size": ({"prompt": "a", "size": "../.."}, "size"),
    "negative seed": ({"prompt": "a", "seed": -1}, "seed"),
    "seed of 100 digits": ({"prompt": "a", "seed": 10**100}, "seed"),
    "no steps": ({"prompt": "a", "steps": 0}, "steps"),
    "many steps": ({"prompt": "a", "steps": 1000}, "steps"),
    "a link": ({"prompt": "a", "response_format": "url"}, "response_format"),
    "unknown format": ({"prompt": "a", "output_format": "svg"}, "output_format"),
    "unknown key": ({"prompt": "a", "code": "import os"}, "code"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_refused_in_the_form_of_openai(case: str, url: str) -> None:
    body, key = WRONG[case]
    status, _, answer = post(url, body)
    assert status == 400
    assert sorted(answer["error"]) == ["code", "message", "param", "type"]
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", key)
    assert len(answer["error"]["message"]) < 700


def test_other_refusals(url: str) -> None:
    assert post(url, b" " * ((1 << 16) + 1))[0] == 413
    assert post(url, {"prompt": "a"}, {"Content-Type": "text/plain"})[0] == 415
    status, _, answer = post(url, {"prompt": "a", "model": "patern"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "Did you mean 'patterns'?" in answer["error"]["message"]
    assert get(url, "/v1/models/none")[0] == 404
    assert get(url, "/docs")[0] == 404
    assert get(url, "/v1/images/generations")[0] == 405
    assert call(url, "OPTIONS", "/v1/images/generations", None, {"Origin": "http://example.org"})[0] == 405


@pytest.mark.parametrize(("prompt", "status"), [("bad", 400), ("break", 500), ("nan", 500)])
def test_a_failure_at_work_is_an_answer(prompt: str, status: int, url: str) -> None:
    got, _, answer = post(url, {"prompt": prompt})
    assert got == status
    assert answer["error"]["message"]


def test_one_bad_request_does_not_fail_the_others_of_its_batch() -> None:
    backend = Patterns()
    backend.gate.clear()
    with image_service(served(backend)) as server, ThreadPoolExecutor(4) as pool:
        prompts = ["first", "good", "bad", "nan"]
        answers = [pool.submit(post, server.url, {"prompt": prompt, "seed": 1}) for prompt in prompts]
        wait_for(server.url, 4)
        backend.gate.set()
        got = [answer.result() for answer in answers]
    assert [status for status, _, _ in got] == [200, 200, 400, 500]
    assert np.array_equal(pixels(got[1][2]["data"][0]), expected("good", 1))


def wait_for(url: str, queued: int) -> None:
    for _ in range(3000):
        if get(url, "/health")[1]["queued"] == queued:
            return
        time.sleep(0.01)
    raise AssertionError(f"there are never {queued} images in the queue")


def test_models_health_info_and_metrics(url: str) -> None:
    assert get(url, "/health") == (200, {"status": "ok", "queued": 0})
    listed = get(url, "/v1/models")[1]
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["patterns", "large"]
    assert get(url, "/v1/models/large")[1] == listed["data"][1]
    info = get(url, "/info")[1]
    assert info["models"]["large"] == {
        "target": "large",
        "base": None,
        "adapter_sha256": None,
        "size": "16x16",
        "steps": 4,
        "backend": "patterns",
        "detail": "numpy",
        "device": "cpu",
    }
    assert info["limits"]["max_images"] == 10
    post(url, {"prompt": "p", "n": 2, "model": "large"})
    text = call(url, "GET", "/metrics")[2].decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['fmg_images_total{model="large"}']) >= 2
    assert float(lines['fmg_requests_total{status="200"}']) >= 1
    assert lines["fmg_queued_images"] == "0.0"


def test_the_schema_states_the_limits(url: str) -> None:
    document = get(url, "/openapi.json")[1]
    operation = document["paths"]["/v1/images/generations"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["prompt"]["maxLength"] == 4000
    assert schema["additionalProperties"] is False
    assert {"200", "400", "503"} <= set(operation["responses"])


def test_a_full_queue_says_when_to_retry() -> None:
    backend = Patterns()
    backend.gate.clear()
    with image_service(served(backend), max_queued=2) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server.url, {"prompt": "a", "n": 2})
        wait_for(server.url, 2)
        status, headers, answer = post(server.url, {"prompt": "b"})
        assert (status, answer["error"]["type"]) == (503, "server_error")
        assert int(headers["retry-after"]) >= 1
        backend.gate.set()
        assert first.result()[0] == 200


def test_images_that_take_too_long_are_an_answer_too() -> None:
    backend = Patterns()
    backend.gate.clear()
    with image_service(served(backend), timeout=0.2) as server:
        assert post(server.url, {"prompt": "a"})[0] == 504
        backend.gate.set()


def test_a_client_that_hangs_up_leaves_the_queue() -> None:
    backend = Patterns()
    backend.gate.clear()
    with image_service(served(backend), max_batch=1) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server.url, {"prompt": "a"})
        wait_for(server.url, 1)
        body = json.dumps({"prompt": "b", "n": 5}).encode()
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            wait_for(server.url, 6)
        wait_for(server.url, 1)
        backend.gate.set()
        assert first.result()[0] == 200
    assert backend.batches == [1]


def test_a_client_that_does_not_read_its_answer_is_cut_off() -> None:
    # noise does not compress: 10 images are 10 MB of base64, more than the buffers of two sockets
    with image_service(served(Patterns(512)), timeout=1.0) as server:
        parts = urlsplit(server.url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((parts.hostname, parts.port))
            connection.settimeout(30)
            body = b'{"prompt": "a", "n": 10}'
            head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            connection.recv(1)
            time.sleep(2.5)
            size = 0
            # the rest of what the system had taken, then a reset
            with contextlib.suppress(ConnectionResetError):
                while chunk := connection.recv(1 << 20):
                    size += len(chunk)
        assert size < 8 << 20
        assert get(server.url, "/health")[0] == 200


def test_accepted_work_is_finished_and_new_work_refused_when_the_server_stops() -> None:
    backend = Patterns()
    backend.gate.clear()
    with image_service(served(backend)) as server, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, server.url, {"prompt": "a", "seed": seed}) for seed in range(8)]
        wait_for(server.url, 8)
        server.stop()
        refused = False
        for _ in range(300):
            try:
                get(server.url, "/health")
            except OSError:
                refused = True
                break
            time.sleep(0.01)
        assert refused
        backend.gate.set()
        for seed, answer in enumerate(answers):
            status, _, found = answer.result()
            assert status == 200
            assert np.array_equal(pixels(found["data"][0]), expected("a", seed))


def test_a_batch_that_does_not_end_cannot_keep_the_server_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmg.inference.service.server.LAST_BATCH_S", 0.1)
    backend = Patterns()
    backend.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        with image_service(served(backend), drain=0.3) as server:
            first = pool.submit(lambda: attempt(server.url))
            wait_for(server.url, 1)
            began = time.monotonic()
        assert time.monotonic() - began < 10
        backend.gate.set()
        assert first.result() != 200


@pytest.mark.parametrize("busy", [False, True])
def test_only_work_that_was_cut_off_is_reported_at_the_end(
    busy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fmg.inference.service.server.LAST_BATCH_S", 0.1)
    backend = Patterns()
    backend.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        with image_service(served(backend), drain=0) as server:
            get(server.url, "/health")
            if busy:
                pool.submit(attempt, server.url)
                wait_for(server.url, 1)
        said = capsys.readouterr().err
        backend.gate.set()
    assert ("Cancel 1 running task(s)" in said) is busy
    assert busy or not said


def attempt(url: str) -> int:
    try:
        return post(url, {"prompt": "a"})[0]
    except (OSError, ValueError):
        return 0


def test_the_token_opens_everything_but_health_and_the_page() -> None:
    with image_service(served(Patterns()), token="secret") as server:
        for path in ("/health", "/", "/page.js", "/page.css"):
            assert call(server.url, "GET", path)[0] == 200
        for path in ("/info", "/metrics", "/v1/models"):
            assert call(server.url, "GET", path)[0] == 401
            assert call(server.url, "GET", path, None, {"Authorization": "Bearer secret"})[0] == 200
        for wrong in ("secret", "Bearer", "Bearer secre", "Basic secret"):
            assert post(server.url, {"prompt": "a"}, {"Authorization": wrong})[0] == 401
        # clients of other machines call it by other names
        headers = {"Authorization": "Bearer secret", "Host": "gpu.example.org:8000"}
        assert post(server.url, {"prompt": "a"}, headers)[0] == 200


def test_without_a_token_only_loopback_names_are_answered(url: str) -> None:
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000"):
        assert get(url, "/v1/models", Host=host)[0] == 200
    for host in ("evil.example.org", "192.0.2.1:80", "localhost.example.org"):
        assert get(url, "/v1/models", Host=host)[0] == 403
        assert post(url, {"prompt": "a"}, {"Host": host})[0] == 403
    assert not names_loopback("")


def test_the_page_may_load_nothing_from_elsewhere(url: str) -> None:
    for path in ("/", "/page.css", "/page.js"):
        status, headers, _ = call(url, "GET", path)
        assert status == 200
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "access-control-allow-origin" not in headers


def test_two_hundred_clients_get_their_own_images(url: str, backend: Patterns) -> None:
    backend.batches.clear()
    barrier = threading.Barrier(100)

    def client(number: int) -> None:
        barrier.wait(60)
        for round_ in range(2):
            prompt, seed = f"prompt {number}", 1000 * number + round_
            status, _, answer = post(url, {"prompt": prompt, "seed": seed, "n": 2})
            assert status in (200, 503)
            for offset, entry in enumerate(answer["data"] if status == 200 else ()):
                assert np.array_equal(pixels(entry), expected(prompt, seed + offset))

    with ThreadPoolExecutor(100) as pool:
        list(pool.map(client, range(100)))
    assert max(backend.batches) <= 16
    assert len(backend.batches) < sum(backend.batches) / 2


def test_an_artifact_on_onnx_runtime_has_several_sizes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from tests.support.tiny_artifact import PROMPTS, build_tiny_artifact

    artifact = build_tiny_artifact(tmp_path / "tiny", batch=(1, 2, 4))
    made = {}
    for side in (8, 12, 16):
        with load(artifact, device="cpu", resolution=side) as generator:
            made[f"{side}x{side}"] = np.asarray(generator.generate(PROMPTS[0], 3).to_pil()[0])
    with ExitStack() as stack:
        models = open_models(named_targets([f"tiny={artifact.folder}"]), {"device": "cpu"}, stack, ignore)
        with image_service(*models) as server:
            assert get(server.url, "/v1/models/tiny")[1]["target"] == "tiny"
            assert str(tmp_path) not in json.dumps(get(server.url, "/info")[1])
            for size in ("16x16", "8x8", "12x12", "16x16", "auto"):
                status, _, answer = post(server.url, {"prompt": PROMPTS[0], "seed": 3, "size": size})
                assert status == 200
                assert np.array_equal(pixels(answer["data"][0]), made[size if size != "auto" else "8x8"])
            for size in ("64x64", "9x9", "8x16", "0x0", "8", "8x8x8"):
                status, _, answer = post(server.url, {"prompt": PROMPTS[0], "size": size})
                assert (status, answer["error"]["param"]) == (400, "size")
        # at the same time, each still gets its own
        with image_service(*models, gather=0.5) as server, ThreadPoolExecutor(6) as pool:
            bodies = [{"prompt": PROMPTS[0], "seed": 3, "size": size} for size in made for _ in range(2)]
            for body, (status, _, answer) in zip(bodies, pool.map(partial(post, server.url), bodies), strict=True):
                assert status == 200
                assert (answer["size"], answer["batch"]) == (body["size"], 2)
                assert np.array_equal(pixels(answer["data"][0]), made[body["size"]])


def test_models_are_found_by_the_target_that_was_given_too() -> None:
    models = served(Patterns(), "model"), served(Patterns(), "model:red"), served(Patterns(), "other")
    with image_service(*models, former={"me/model@v1": "model", "runs/other": "other"}) as server:
        for name, known in {"model": "model", "me/model@v1:red": "model:red", "runs/other": "other"}.items():
            assert post(server.url, {"prompt": "p", "model": name})[2]["model"] == known
            assert get(server.url, f"/v1/models/{name}")[1]["id"] == known
        for name in ("me/model", "runs/other:red", "runs"):
            status, _, answer = post(server.url, {"prompt": "p", "model": name})
            assert (status, answer["error"]["message"].partition("'")[2][: len(name)]) == (404, name)


def test_names_of_targets(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "a" / "run-1", tmp_path / "b" / "run-1"
    run.mkdir(parents=True)
    other.mkdir(parents=True)
    found = named_targets([str(run), f"tuned={other}", "meanflow-shapes", "me/model@v1"])
    assert [named.name for named in found] == ["run-1", "tuned", "meanflow-shapes", "model@v1"]
    assert [named.shown for named in found] == ["run-1", "run-1", "meanflow-shapes", "me/model@v1"]
    assert former_names(found) == {str(run): "run-1", "me/model@v1": "model@v1"}
    monkeypatch.chdir(run)
    for text, shown in {
        ".": "run-1",
        "..": "a",
        f"{run}/checkpoints/checkpoint-2": "run-1/checkpoints/checkpoint-2",
    }.items():
        assert Named("name", text).shown == Target(text, Recipe.default(), None).shown == shown
    # as many folders as tell them apart
    for targets, names in {
        (str(run), str(other)): ["a-run-1", "b-run-1"],
        ("me/model", str(run), "you/model"): ["me-model", "run-1", "you-model"],
        (str(run), "run-1=meanflow-shapes"): ["a-run-1", "run-1"],
        ("me/model@refs/pr/1",): ["model@refs-pr-1"],
    }.items():
        assert [named.name for named in named_targets(targets)] == names
    with pytest.raises(UsageError, match="2 targets are called 'run-1'"):
        named_targets([str(run), str(run)])
    # one folder, written in two ways
    with pytest.raises(UsageError, match=r"2 targets are called '.+-a-run-1'"):
        named_targets([str(run), f"{run}/."])
    # the name of one model is not a former name of another, nor are those of its adapters
    assert former_names([Named("a-run", "run"), Named("run", "meanflow-shapes", chosen=True)]) == {}
    with pytest.raises(UsageError, match="cannot be the name of a model"):
        named_targets(["a:b=meanflow-shapes"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_addresses_than_loopback_need_a_token(host: str) -> None:
    with pytest.raises(UsageError, match=r"no token is set\. Set a token \(VARIABLE\)"):
        check_token(host, None, "VARIABLE")
    check_token(host, "secret", "VARIABLE")


def test_a_taken_port_is_one_line(url: str) -> None:
    port = int(url.rpartition(":")[2])
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
        Address("127.0.0.1", port)
