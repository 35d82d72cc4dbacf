"""A vision-language judge behind a chat endpoint, played by a small server."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time

import pytest
import torch
from diffalign_rewards import remote
from diffalign_rewards.vlm import VLMReward
from PIL import Image
from torch.testing import assert_close

from diffalign.errors import RewardError
from diffalign.images import to_tensor
from diffalign.rewards import load_reward

JSON = {"Content-Type": "application/json"}
PICTURE = [Image.new("RGB", (8, 8), (50, 0, 0))]


def chat(*, text: str = "", tokens: dict[str, float] | None = None) -> tuple[int, dict[str, str], bytes]:
    """A chat completion: its text, and the probabilities of its first token."""
    choice: dict[str, object] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if tokens is not None:
        top = [{"token": token, "logprob": math.log(share)} for token, share in tokens.items()]
        choice["logprobs"] = {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": top}]}
    return 200, JSON, json.dumps({"choices": [choice]}).encode()


def seen(body: bytes) -> tuple[Image.Image, str, dict]:
    """Picture, question and the other fields of a request."""
    fields = json.loads(body)
    (message,) = fields.pop("messages")
    shown, question = message["content"]
    kind, _, data = shown["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))), question["text"], fields


def failure(answering, answer, **options: object) -> str:
    reward = VLMReward(url=answering(lambda *_: answer), model="judge-1", retries=0, **options)
    with pytest.raises(RewardError) as error:
        reward(PICTURE, ["a cat"])
    assert "judge-1" in str(error.value)
    return str(error.value)


def test_yes_no_is_the_share_of_yes(answering):
    asked = []

    def answer(path, headers, body):
        asked.append((path, headers["Authorization"], *seen(body)[1:]))
        return chat(tokens={"Yes": 0.4, " no": 0.2, "▁yes": 0.1, "NO": 0.05, "Maybe": 0.2, "yesterday": 0.05})

    reward = load_reward("vlm", url=answering(answer) + "/v1", model="m")
    assert (reward.range, reward.needs_prompt) == ((0.0, 1.0), True)
    # yes 0.4 + 0.1, no 0.2 + 0.05: 0.5 / 0.75
    assert_close(reward(PICTURE, ["two {cats}"]), torch.tensor([2 / 3]))
    fields = {"model": "m", "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    question = 'Does this figure show "two {cats}"? Please answer yes or no.'
    assert asked == [("/v1/chat/completions", None, question, fields)]


def test_one_word_alone_is_all_or_nothing(answering):
    for word, share in (("yes", 1.0), ("no", 0.0)):
        reward = VLMReward(url=answering(lambda *_, word=word: chat(tokens={word: 0.9, "x": 0.1})), model="m")
        assert reward(PICTURE, ["a"]).item() == share


def test_pictures_keep_their_prompts_and_only_so_many_are_asked_at_once(answering):
    lock, under_way, most = threading.Lock(), 0, 0

    def answer(path, headers, body):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        picture, question, _ = seen(body)
        red = picture.getpixel((0, 0))[0]
        time.sleep(0.1 if red == 0 else 0.02)  # the first answer comes last
        with lock:
            under_way -= 1
        return chat(text=f"Score: {red + len(question)}")

    reward = VLMReward(
        url=answering(answer), model="m", mode="grade", template="{prompt}", maximum=300, concurrency=3
    )
    pictures = [Image.new("RGB", (4, 4), (red, 9, 9)) for red in range(0, 120, 10)]
    prompts = ["x" * i for i in range(12)]
    expected = torch.tensor([11.0 * i for i in range(12)])
    assert_close(reward(pictures, prompts), expected)
    assert most == 3
    assert_close(reward(to_tensor(pictures), prompts), expected)


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Score: 7", 7.0),
        ("I'd say 3/10 at first, score 4.\n\n**SCORE:** 7.5 of 10", 7.5),
        ("score: 0", 0.0),
        ("Alignment Score (1-5): 2\nScore: 10.", 10.0),
    ],
)
def test_the_last_grade_counts(answering, text: str, grade: float):
    reward = VLMReward(url=answering(lambda *_: chat(text=text)), model="m", mode="grade")
    assert reward(PICTURE, ["a"]).item() == grade


def test_the_scale_and_the_pattern_are_options(answering):
    asked = []

    def answer(path, headers, body):
        asked.append(seen(body)[1:])
        return chat(text="alignment score (1-5): -2.5 | Score: 9")

    reward = VLMReward(
        url=answering(answer),
        model="m",
        mode="grade",
        pattern=r"Alignment Score \(1-5\):\s*(-?[\d.]+)",
        minimum=-5,
        maximum=5,
        request={"max_tokens": None, "max_completion_tokens": 40, "seed": 1},
    )
    assert reward.range == (-5.0, 5.0)
    assert reward(PICTURE, ["a"]).item() == -2.5
    question, fields = asked[0]
    assert "from -5 to 5" in question
    assert fields == {"model": "m", "temperature": 0, "max_completion_tokens": 40, "seed": 1}


def test_an_answer_that_cannot_be_read_is_shown(answering):
    lost = failure(answering, chat(text="I am sorry, but " + "x" * 500), mode="grade")
    assert "gave no grade" in lost
    assert "I am sorry, but xxx" in lost
    assert "x" * 200 not in lost
    assert "gave 11 on a scale of 0 to 10" in failure(answering, chat(text="Score: 11"), mode="grade")
    assert "gave '.' as a grade" in failure(
        answering, chat(text="Score ."), mode="grade", pattern=r"score ([\d.]*)"
    )
    assert "answers neither yes nor no" in failure(answering, chat(tokens={"<think>": 0.9, "\n": 0.1}))
    assert "gives no log-probabilities" in failure(answering, chat(text="yes"))
    assert "unknown form" in failure(answering, (200, JSON, b'{"choices": []}'))
    assert "did not answer with a JSON object" in failure(answering, (200, {}, b"<html>"))
    assert "refused the request" in failure(answering, (400, JSON, b'{"error": "no such model"}'))
    assert "does not answer" in failure(answering, (502, {}, b"bad gateway"))


def test_trouble_that_passes_is_waited_out(answering, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    troubles = [(500, {}, b""), (429, {}, b""), (0, {}, b"")]
    reward = VLMReward(
        url=answering(lambda *_: troubles.pop() if troubles else chat(tokens={"yes": 0.3, "no": 0.1})),
        model="m",
    )
    assert_close(reward(PICTURE, ["a"]), torch.tensor([0.75]))
    assert not troubles


def test_the_key_comes_from_the_environment(answering, monkeypatch):
    keys = []

    def answer(path, headers, body):
        keys.append(headers["Authorization"])
        return chat(tokens={"yes": 1.0})

    url = answering(answer)
    with pytest.raises(RewardError, match="JUDGE_KEY is not set"):
        VLMReward(url=url, model="m", key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "sk-123")
    VLMReward(url=url, model="m", key_env="JUDGE_KEY")(PICTURE, ["a"])
    assert keys == ["Bearer sk-123"]


def test_a_question_without_the_prompt_needs_none(answering):
    url = answering(lambda *_: chat(tokens={"yes": 1.0}))
    assert not VLMReward(url=url, model="m", template="Is this a photograph?").needs_prompt


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mode": "guess"}, "the mode yes_no or grade"),
        ({"concurrency": 0}, "concurrency of 1 or more"),
        ({"maximum": 5}, "maximum is an option of vlm's mode grade"),
        ({"mode": "grade", "minimum": 10}, "minimum must be below maximum"),
        ({"mode": "grade", "pattern": "("}, "no regular expression"),
        ({"mode": "grade", "pattern": r"\d"}, "one group"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, complaint):
    with pytest.raises(RewardError, match=complaint):
        VLMReward(url="http://127.0.0.1:1", model="m", **options)
