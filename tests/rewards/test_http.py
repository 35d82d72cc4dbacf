"""The client of the reward service, against the real one and against servers that misbehave."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffalign_rewards import remote
from diffalign_rewards.http import HTTPReward
from diffalign_rewards.jpeg import JPEGCompressibility
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from diffalign.errors import RewardError
from diffalign.images import to_pil
from diffalign.rewards import NonFiniteScore, RewardModel, load_reward

TOKEN = "0123456789abcdef"
JSON = {"Content-Type": "application/json"}


class Letters(RewardModel):
    """Minus the letters of the prompt; fails on two of them."""

    name, range, higher_is_better, license = "letters", (-9.0, 0.0), False, "CC0-1.0"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if "broken" in prompts:
            raise RewardError("no opinion", why="the prompt is broken")
        return torch.tensor([math.nan if prompt == "nan" else -float(len(prompt)) for prompt in prompts])


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)


def described(**changes: object) -> bytes:
    """What /rewards of a service with the one reward `r` says."""
    attributes = {"range": [None, 1], "higher_is_better": True, "needs_prompt": False, "license": "MIT"}
    limits = {"batch": 8, "body_bytes": 10**6, "pixels": 10**6}
    return json.dumps({"rewards": {"r": attributes}, "limits": limits, **changes}).encode()


def scripted(answers: list[tuple[int, dict[str, str], bytes]], asked: list[str]):
    """Describes itself, then gives these answers, the last one for ever; notes the paths."""

    def answer(path, headers, body):
        asked.append(path)
        if path == "/rewards":
            return 200, JSON, described()
        return answers.pop(0) if len(answers) > 1 else answers[0]

    return answer


def scores(*values: float) -> tuple[int, dict[str, str], bytes]:
    return 200, JSON, json.dumps({"results": [{"score": value} for value in values]}).encode()


PICTURE = torch.zeros(1, 3, 8, 8)


def test_scores_and_attributes_are_those_of_the_reward(serve, images: Tensor, prompts: list[str]):
    local = JPEGCompressibility()
    url = serve({"jpeg": local, "letters": Letters()})
    reward = load_reward("http", url=url, reward="jpeg")
    assert (reward.range, reward.license) == ((-math.inf, 0.0), "Apache-2.0")
    assert (reward.higher_is_better, reward.needs_prompt, reward.differentiable) == (True, False, False)
    assert_close(reward(images, prompts), local(to_pil(images), prompts), rtol=0, atol=0)
    pictures = [picture.resize((20 + i, 30)) for i, picture in enumerate(to_pil(images))]
    assert_close(reward(pictures, prompts), local(pictures, prompts), rtol=0, atol=0)
    letters = HTTPReward(url=url + "/", reward="letters")
    assert (letters.range, letters.higher_is_better, letters.needs_prompt) == ((-9.0, 0.0), False, True)
    assert_close(letters(images, prompts), torch.tensor([-float(len(prompt)) for prompt in prompts]))


def test_requests_stay_below_the_limits_of_the_service(serve, images: Tensor, prompts: list[str]):
    from diffalign.rewards.service.limits import Limits

    noise = to_pil(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    local = JPEGCompressibility()
    for limits in (Limits(batch=3), Limits(body_bytes=24_000)):  # a picture of noise is 16 kB in base64
        reward = HTTPReward(url=serve({"jpeg": local}, limits=limits))
        assert_close(reward(noise, prompts), local(noise, prompts), rtol=0, atol=0)
    reward = HTTPReward(url=serve({"jpeg": local}, limits=Limits(body_bytes=9000)))
    with pytest.raises(RewardError, match="the body is too large; at most 9000 bytes"):
        reward(noise, prompts)


def test_the_reward_is_named_or_the_only_one(serve):
    one, two = serve({"letters": Letters()}), serve({"letters": Letters(), "jpeg": JPEGCompressibility()})
    assert HTTPReward(url=one).name == f"letters at {one}"
    with pytest.raises(RewardError, match="has several rewards"):
        HTTPReward(url=two)
    with pytest.raises(RewardError, match="has no reward leters") as error:
        HTTPReward(url=two, reward="leters")
    assert "letters, jpeg" in str(error.value)


def test_the_token_is_read_from_the_environment(serve, monkeypatch):
    url = serve({"letters": Letters()}, token=TOKEN)
    with pytest.raises(RewardError, match="MY_TOKEN is not set"):
        HTTPReward(url=url, token_env="MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", "two words")
    with pytest.raises(RewardError, match="holds no token"):
        HTTPReward(url=url, token_env="MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", TOKEN + "x")
    with pytest.raises(RewardError, match="refused the request") as error:
        HTTPReward(url=url, token_env="MY_TOKEN")
    assert "HTTP 401" in str(error.value)
    assert TOKEN not in str(error.value)
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    assert_close(HTTPReward(url=url, token_env="MY_TOKEN")(PICTURE, ["four"]), torch.tensor([-4.0]))


def test_a_score_that_is_not_finite_names_its_picture(serve):
    reward = HTTPReward(url=serve({"letters": Letters()}))
    prompts = ["a"] * 40
    prompts[37] = "nan"  # in the second request: batches are of 32
    with pytest.raises(NonFiniteScore) as error:
        reward(PICTURE.expand(40, -1, -1, -1), prompts)
    assert error.value.index == 37
    assert reward.endpoint.url in str(error.value)


def test_a_picture_that_cannot_be_scored_stops_with_the_reason(serve):
    reward = HTTPReward(url=serve({"letters": Letters()}))
    with pytest.raises(RewardError, match="could not score a picture") as error:
        reward(PICTURE.expand(2, -1, -1, -1), ["fine", "broken"])
    assert "no opinion: the prompt is broken" in str(error.value)
    assert "prompt 'broken'" in str(error.value)


def test_trouble_that_passes_is_waited_out(answering, hurry):
    asked: list[str] = []
    cut = (200, {"Content-Length": "1000"}, b'{"results"')
    troubles = [(503, {}, b"starting"), (429, {"Retry-After": "0"}, b""), (0, {}, b""), cut, (500, {}, b"")]
    reward = HTTPReward(url=answering(scripted([*troubles, scores(0.25)], asked)), retries=5)
    assert_close(reward(PICTURE, ["a"]), torch.tensor([0.25]))
    assert asked == ["/rewards"] + ["/score"] * 6


def test_trouble_that_stays_is_an_error_after_the_retries(answering, hurry):
    asked: list[str] = []
    reward = HTTPReward(url=answering(scripted([(503, {}, b"<b>busy</b>")], asked)), retries=2)
    with pytest.raises(RewardError, match="does not answer") as error:
        reward(PICTURE, ["a"])
    assert asked.count("/score") == 3
    assert "3 attempts; the last: HTTP 503" in str(error.value)
    assert "<b>busy</b>" in str(error.value)
    assert error.value.exit_code == 6


def test_retry_after_is_respected(answering, hurry):
    reward = HTTPReward(url=answering(scripted([(429, {"Retry-After": "1"}, b""), scores(0)], [])), retries=1)
    start = time.monotonic()
    reward(PICTURE, ["a"])
    assert time.monotonic() - start >= 1


def test_a_service_that_hangs_is_left_after_the_timeout(answering, hurry):
    def hang(path, headers, body):
        time.sleep(0.5)
        return 200, JSON, described()

    with pytest.raises(RewardError, match="does not answer") as error:
        HTTPReward(url=answering(hang), timeout_s=0.1, retries=1)
    assert "2 attempts; the last: TimeoutError" in str(error.value)


def test_delays_double_up_to_thirty_seconds():
    for attempt, full in enumerate([0.5, 1, 2, 4, 8, 16, 30, 30]):
        drawn = [remote._delay(attempt) for _ in range(200)]
        assert full / 2 <= min(drawn) < 0.6 * full
        assert 0.9 * full < max(drawn) <= full


@pytest.mark.parametrize(
    ("answer", "what", "why"),
    [
        ((200, {}, b"<html>Sign in</html>"), "did not answer with a JSON object", "<html>Sign in</html>"),
        ((200, JSON, b"[1]"), "did not answer with a JSON object", "[1]"),
        (scores(0.1, 0.2), "returned the wrong number of scores", "2 for 1 pictures"),
        ((200, JSON, b'{"scores": [1]}'), "returned the wrong number of scores", "no for 1 pictures"),
        ((200, JSON, b'{"results": [{"score": "0"}]}'), "neither a score nor an error", "'score': '0'"),
        ((200, JSON, b'{"results": [null]}'), "neither a score nor an error", "None"),
        ((422, JSON, b'{"detail": "no such thing"}'), "refused the request", "no such thing"),
        ((404, {}, b"nothing here"), "refused the request", "nothing here"),
    ],
)
def test_a_wrong_answer_names_the_service_and_is_never_a_zero(answering, answer, what, why):
    asked: list[str] = []
    reward = HTTPReward(url=answering(scripted([answer], asked)))
    with pytest.raises(RewardError, match=what) as error:
        reward(PICTURE, ["a"])
    assert reward.endpoint.url in str(error.value)
    assert why in str(error.value)
    assert asked.count("/score") == 1


@pytest.mark.parametrize(
    "changes",
    [{"rewards": []}, {"rewards": {"r": {"range": [0]}}}, {"limits": {"batch": 0, "body_bytes": 9}}],
)
def test_another_kind_of_service_is_refused_when_the_reward_is_built(answering, changes):
    with pytest.raises(RewardError, match=r"does not describe its rewards|has no reward"):
        HTTPReward(url=answering(lambda *_: (200, JSON, described(**changes))), reward="r")


def test_a_redirect_does_not_carry_the_token_away(answering, monkeypatch):
    seen: list[str | None] = []

    def thief(path, headers, body):
        seen.append(headers["Authorization"])
        return 200, JSON, described()

    elsewhere = answering(thief)
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    with pytest.raises(RewardError, match="HTTP 302"):
        HTTPReward(url=answering(lambda *_: (302, {"Location": elsewhere}, b"")), token_env="MY_TOKEN")
    assert seen == []


@pytest.mark.parametrize(
    "options",
    [
        {"url": url}
        for url in ("localhost:1", "file:///etc", "http://", "http://a:b@h", "http://h/?x", "http://h:x")
    ]
    + [{"url": "http://h", "timeout_s": 0}, {"url": "http://h", "retries": -1}],
)
def test_bad_options_are_refused_before_anything_is_sent(options):
    with pytest.raises(RewardError, match=r"no address of a service|timeout_s must be"):
        HTTPReward(**options)


SLOW = """
import time
from pathlib import Path
def slow(images, prompts):
    Path(__file__).with_name("called").touch()
    time.sleep(1)
    return [0.0] * len(prompts)
slow.needs_prompt = False
"""


def test_score_ends_with_code_6_when_the_service_dies(tmp_path: Path):
    pytest.importorskip("uvicorn")
    (tmp_path / "mine.py").write_text(SLOW)
    (tmp_path / "pictures").mkdir()
    for i in range(80):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    program = [sys.executable, "-m", "diffalign"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    served = [*program, "serve-rewards", "--rewards", f"{tmp_path / 'mine.py'}:slow", "--port", "0"]
    with subprocess.Popen(served, stdout=subprocess.PIPE, text=True, env=environment) as service:
        try:
            assert service.stdout is not None
            url = next(word for word in service.stdout.readline().split() if word.startswith("http://"))
            scoring = [*program, "score", str(tmp_path / "pictures"), "--rewards", "http", "--options"]
            with subprocess.Popen(
                [*scoring, f"http.url={url}", "http.retries=2"],
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            ) as client:
                while not (tmp_path / "called").exists():
                    assert client.poll() is None
                    time.sleep(0.05)
                service.send_signal(signal.SIGKILL)
                _, shown = client.communicate(timeout=60)
        finally:
            service.kill()
    assert client.returncode == 6
    assert f"the reward service at {url} does not answer" in shown
    assert "3 attempts" in shown
    assert "Traceback" not in shown
