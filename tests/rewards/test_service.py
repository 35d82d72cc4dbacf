"""The reward service, over real sockets."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import random
import signal
import socket
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from threading import Barrier, Event, Thread

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.cli.serve_rewards import Args, run
from diffalign.errors import ConfigError, DataError, DeviceError, DiffalignError
from diffalign.rewards import RewardModel

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from diffalign.rewards.service.limits import Limits
from diffalign.rewards.service.worker import Worker

TOKEN = "0123456789abcdef"


class Red(RewardModel):
    """Mean red level (0 to 255) plus 1000 a letter of the prompt: no two requests of a test are alike."""

    name, range, license = "red", (0.0, math.inf), "CC0-1.0"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go, self.called = Event(), Event()
        self.go.set()

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        self.called.set()
        self.go.wait(10)
        self.batches.append(len(pictures))
        return super().score_pictures(pictures, prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if "data error" in prompts:
            raise DataError("no such prompt", why="it is not in the list")
        if "crash" in prompts:
            raise KeyError("secret path")
        scores = images[:, 0].mean((1, 2)) * 255
        scores[[prompt == "nan" for prompt in prompts]] = math.nan
        return scores + 1000 * torch.tensor([len(prompt) for prompt in prompts])


def png(red: int, size: tuple[int, int] = (8, 8)) -> str:
    return encoded(Image.new("RGB", size, (red, 0, 0)), "PNG")


def encoded(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    picture.save(file, format=kind)
    return base64.b64encode(file.getvalue()).decode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def ask(url: str, body: object = None, **headers: str) -> tuple[int, dict, Message]:
    """Status, JSON and headers of a GET, or of a POST of `body` (bytes as they are)."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            text = error.read()
            return error.code, json.loads(text) if text[:1] == b"{" else {"text": text}, error.headers


def call(images: list[str], prompts: list[str], reward: str = "red") -> dict[str, object]:
    return {"reward": reward, "images": images, "prompts": prompts}


def test_scores_come_in_order_and_a_broken_picture_fails_alone(serve):
    url = serve({"red": Red()})
    noise = Image.effect_noise((64, 64), 50).convert("RGB")
    cut = base64.b64encode(base64.b64decode(encoded(noise, "PNG"))[:2000]).decode()
    pictures = [
        png(10),
        "!!!",
        base64.b64encode(b"garbage").decode(),
        encoded(noise, "JPEG"),
        cut,
        png(30, (5, 9)),
    ]
    status, answer, _ = ask(f"{url}/score", call(pictures, ["a", "b", "c", "d", "e", "ff"]))
    assert status == 200
    assert answer["reward"] == "red"
    first, *broken, last = answer["results"]
    assert first["score"] == pytest.approx(1010, abs=1e-3)
    assert last["score"] == pytest.approx(2030, abs=1e-3)
    assert [result["error"]["kind"] for result in broken] == ["picture"] * 4
    messages = [result["error"]["message"] for result in broken]
    assert messages[:3] == [
        "the picture is not base64",
        "the picture is not a PNG",
        "the picture is not a PNG",
    ]
    assert "unreadable picture" in messages[3]


def test_a_scorer_that_fails_on_one_picture_fails_for_that_one_only(serve):
    url = serve({"red": Red()})
    prompts = ["a", "nan", "bb", "data error", "crash", "ccc"]
    _, answer, _ = ask(f"{url}/score", call([png(7)] * 6, prompts))
    scores = [result.get("score") for result in answer["results"]]
    assert scores == [pytest.approx(1007), None, pytest.approx(2007), None, None, pytest.approx(3007)]
    errors = [result["error"] for result in answer["results"] if "error" in result]
    assert [error["kind"] for error in errors] == ["non_finite", "reward", "reward"]
    assert errors[0]["message"] == "reward red gave nan"
    assert errors[1]["message"] == "no such prompt: it is not in the list"
    assert "KeyError" in errors[2]["message"]
    assert "secret path" not in json.dumps(answer)


def test_a_picture_of_30000_x_30000_is_refused_from_its_header(serve):
    url = serve({"red": Red()}, limits=Limits(pixels=100))
    only_a_header = base64.b64encode(b"\x89PNG\r\n\x1a\n" + header(30_000, 30_000)).decode()
    data = base64.b64decode(png(5, (20, 20)))
    small_first = base64.b64encode(data[:8] + header(1, 1) + data[8:]).decode()
    _, answer, _ = ask(
        f"{url}/score", call([only_a_header, png(5), small_first, png(5, (11, 10))], ["a"] * 4)
    )
    huge, fine, twice, above = answer["results"]
    assert (
        huge["error"]["message"] == "the picture is too large: 30000 x 30000 pixels; the limit is 100 in all"
    )
    assert fine["score"] == pytest.approx(1005)
    assert twice["error"]["kind"] == "picture"
    assert "11 x 10" in above["error"]["message"]


def test_rewards_are_described_with_their_attributes(serve):
    status, answer, _ = ask(serve({"red": Red()}, limits=Limits(batch=3)) + "/rewards")
    assert status == 200
    assert answer["rewards"] == {
        "red": {
            "range": [0.0, None],
            "higher_is_better": True,
            "differentiable": False,
            "needs_prompt": True,
            "license": "CC0-1.0",
        }
    }
    assert answer["limits"] == {"batch": 3, "body_bytes": 32 * 2**20, "pixels": 2**24}


def test_only_the_token_opens_the_doors(serve):
    url = serve({"red": Red()}, token=TOKEN)
    body = call([png(1)], ["a"])
    for given in (
        {},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer "},
    ):
        for path, asked in (("/rewards", None), ("/score", body)):
            status, _, headers = ask(url + path, asked, **given)
            assert status == 401
            assert headers["WWW-Authenticate"] == "Bearer"
    assert ask(f"{url}/score", body, Authorization=f"Bearer {TOKEN}")[0] == 200
    assert ask(f"{url}/health")[:2] == (200, {"status": "ok"})
    assert ask(f"{url}/health", Host="rewards.example")[0] == 200


def test_without_a_token_web_pages_are_kept_out(serve):
    url = serve({"red": Red()})
    assert ask(f"{url}/rewards", Host="evil.example")[0] == 400
    status, answer, _ = ask(f"{url}/score", call([png(1)], ["a"]), **{"Content-Type": "text/plain"})
    assert (status, answer["detail"]) == (415, "send application/json")


def test_a_request_above_a_limit_is_413(serve):
    url = serve({"red": Red()}, limits=Limits(body_bytes=5000, batch=2))
    status, answer, _ = ask(f"{url}/score", call(["x" * 100_000], ["a"]))
    assert (status, answer["detail"]) == (413, "the body is too large; at most 5000 bytes")
    status, answer, _ = ask(f"{url}/score", call([png(1)] * 3, ["a"] * 3))
    assert (status, answer["detail"]) == (413, "3 images; at most 2 a request")
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    pieces = (b" " * 1000 for _ in range(20))  # chunked: no Content-Length announces the 20 kB
    connection.request("POST", "/score", body=pieces, headers={"Content-Type": "application/json"})
    assert connection.getresponse().status == 413
    connection.close()
    assert ask(f"{url}/score", call([png(1)] * 2, ["a"] * 2))[0] == 200


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"\x00\xff", "Invalid JSON"),
        (b'{"reward": "red", "images": ["\\ud800"], "prompts": ["a"]}', "Invalid JSON"),
        (b"[" * 2000, "Invalid JSON"),
        ({"reward": "red", "images": ["a"]}, "prompts: Field required"),
        ({"reward": "red", "images": [1], "prompts": ["a"]}, "images.0: Input should be a valid string"),
        ({**call(["a"], ["a"]), "pickle": "x"}, "pickle: Extra inputs"),
        (call([], []), "images: List should have at least 1 item"),
        (call(["a"], ["a"], reward="blue"), "no reward 'blue'; there are red"),
        (call(["a"], ["a", "b"]), "1 images but 2 prompts"),
    ],
)
def test_garbage_is_422_and_says_why(serve, body, complaint):
    status, answer, _ = ask(serve({"red": Red()}) + "/score", body)
    assert status == 422
    assert complaint in answer["detail"]


def test_a_full_queue_is_429_and_loses_nobody(serve):
    reward = Red()
    reward.go.clear()
    url = serve({"red": reward}, limits=Limits(queue=1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, f"{url}/score", call([png(9)], ["a"]))
        assert reward.called.wait(30)
        status, answer, headers = ask(f"{url}/score", call([png(1)], ["a"]))
        reward.go.set()
        assert (status, headers["Retry-After"]) == (429, "1")
        assert "1 requests are waiting" in answer["detail"]
        assert waiting.result()[1]["results"][0]["score"] == pytest.approx(1009)
    assert ask(f"{url}/score", call([png(1)], ["a"]))[0] == 200


def test_a_body_that_does_not_come_is_408(serve):
    url = serve({"red": Red()}, limits=Limits(body_s=0.2))
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        head = (
            "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9"
        )
        line.sendall(head.encode() + b"\r\n\r\n{")
        assert line.recv(100).startswith(b"HTTP/1.1 408")


def test_what_waits_is_scored_as_one_batch():
    reward = Red()
    reward.batch_size = 4
    worker = Worker("red", reward, Limits())
    answers = [worker.submit([png(i)] * 2, ["a", "bb"]) for i in range(5)]
    worker.start()
    for i, answer in enumerate(answers):
        assert answer.result(30) == [pytest.approx(1000 + i), pytest.approx(2000 + i)]
    worker.stop()
    assert not worker.alive
    assert reward.batches == [4, 4, 2]


@pytest.fixture
def taking_turns() -> Iterator[None]:
    """Clients and service share this process: with Python's 5 ms turns the service would hardly get one."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_64_clients_at_once_get_their_own_scores(serve, taking_turns, seconds: int):
    reward = Red()
    url = serve({"red": reward})
    at_once = Barrier(64)
    pictures = {red: png(red, (8, 8) if red % 2 else (6, 10)) for red in range(256)}

    def client(number: int) -> int:
        draw = random.Random(number)
        at_once.wait(60)
        end, sent = time.monotonic() + seconds, 0
        while time.monotonic() < end or not sent:
            reds = [draw.randrange(256) for _ in range(draw.randint(1, 4))]
            prompts = ["x" * draw.randrange(50) for _ in reds]
            status, answer, _ = ask(f"{url}/score", call([pictures[red] for red in reds], prompts))
            assert status == 200, answer
            scores = [result["score"] for result in answer["results"]]
            expected = [red + 1000 * len(prompt) for red, prompt in zip(reds, prompts, strict=True)]
            assert scores == pytest.approx(expected, abs=0.01)
            sent += len(reds)
        return sent

    with ThreadPoolExecutor(64) as pool:
        sent = sum(pool.map(client, range(64)))
    assert sum(reward.batches) == sent
    assert max(reward.batches) > 4  # more than one client can ask for: they were scored together


# --- diffalign serve-rewards ----------------------------------------------------------------------------------

SLOW = """
import time
from pathlib import Path
def slow(images, prompts):
    Path(__file__).with_name("called").touch()
    time.sleep(0.5)
    return [7.0] * len(prompts)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_service_after_the_requests_under_way(tmp_path: Path, capsys, number: int):
    (tmp_path / "mine.py").write_text(SLOW)
    name = f"{tmp_path / 'mine.py'}:slow"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url, answers = f"http://127.0.0.1:{port}", []

    def use() -> None:
        try:
            while True:
                try:
                    assert ask(f"{url}/health")[0] == 200
                    break
                except urllib.error.URLError:
                    time.sleep(0.05)
            request = Thread(target=lambda: answers.append(ask(f"{url}/score", call([png(1)], ["a"], name))))
            request.start()
            while not (tmp_path / "called").exists():
                time.sleep(0.02)
        finally:
            os.kill(os.getpid(), number)
        request.join()

    client = Thread(target=use)
    handler = signal.getsignal(number)
    client.start()
    run(Args(rewards=name, port=port))
    client.join()
    assert answers[0][1]["results"] == [{"score": 7.0}]
    assert signal.getsignal(number) is handler
    out = capsys.readouterr().out
    assert f"serving {name} at {url} (no token, this machine only)" in out
    assert out.endswith("stopped\n")


def test_the_token_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch):
    from diffalign.rewards.service.access import read_token

    file = tmp_path / "token.txt"
    file.write_text(f"{TOKEN}\n")
    assert read_token("NOT_SET_ANYWHERE", None) is None
    assert read_token("NOT_SET_ANYWHERE", file) == TOKEN
    monkeypatch.setenv("MY_TOKEN", "fedcba9876543210")
    assert read_token("MY_TOKEN", None) == "fedcba9876543210"
    assert read_token("MY_TOKEN", file) == TOKEN


def refusal(kind: type[DiffalignError], match: str, **options: object) -> DiffalignError:
    with pytest.raises(kind, match=match) as error:
        run(Args(rewards="jpeg_compressibility", **options))
    return error.value


def test_what_cannot_be_served_is_said_at_once(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("DIFFALIGN_SERVICE_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "localhost", "192.0.2.1"):
        error = refusal(ConfigError, "needs a token", host=host, port=0)
        assert "DIFFALIGN_SERVICE_TOKEN" in str(error)
    refusal(ConfigError, "token file cannot be read", token_file=tmp_path / "absent")
    for word in ("", "short", "with a space in it"):
        monkeypatch.setenv("MY_TOKEN", word)
        refusal(ConfigError, "at least 16 letters", token_env="MY_TOKEN", host="0.0.0.0")
    refusal(ConfigError, "--max-queue must be at least 1", max_queue=0)
    refusal(ConfigError, "--gather-ms", gather_ms=-1)
    refusal(DeviceError, "--device nonsense", device="nonsense", port=0)
    refusal(ConfigError, "between 0 and 65535", port=99_999)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refusal(ConfigError, "cannot listen", port=taken.getsockname()[1])


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    import diffalign.rewards.service as package

    for module in ("app", "server"):
        monkeypatch.delattr(package, module, raising=False)
        monkeypatch.delitem(sys.modules, f"diffalign.rewards.service.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    error = refusal(DiffalignError, "needs FastAPI")
    assert error.hint == "pip install 'diffalign[serve]'"
