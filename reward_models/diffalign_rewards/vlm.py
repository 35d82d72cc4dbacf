"""A vision-language model as the judge, behind an OpenAI-compatible chat endpoint (vLLM, SGLang, hosted ones)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import RewardError
from diffalign.images import to_pil
from diffalign.rewards import RewardModel
from diffalign_rewards.remote import Endpoint, beginning, png_base64, secret

VQASCORE = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""Lin et al. 2024, arXiv:2404.01291, sec. 3."""
GRADE = (
    'How well does this picture show "{prompt}"? Grade it from {minimum} to {maximum}. '
    "Answer with one line: Score: <number>"
)
_GRADE_PATTERN = r"score[\s:*]*(-?\d+(?:\.\d+)?)"
_TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give
_WORD_MARKS = " \t\r\n\u2581\u0120"  # SentencePiece and byte-level BPE write a space before a word like this


class VLMReward(RewardModel):
    """A vision-language model's answer: P(yes) (VQAScore), or a grade read from its text.

    yes_no: P(yes) / (P(yes) + P(no)) from the log-probabilities of the first token, 0 to 1. A word that is not
    among the twenty likeliest counts as 0. grade: the last match of `pattern` in the answer.

    Args:
        url: the address before /chat/completions, e.g. http://localhost:8000/v1.
        model: the model's name there.
        mode: yes_no or grade.
        template: the question; {prompt} is replaced, and in grade {minimum} and {maximum}. Without {prompt} the
            prompts are ignored. Default: VQAScore's question, or a plain request for a grade.
        pattern: grade only: a regular expression with one group, the number; letter case is ignored.
        minimum, maximum: grade only: the scale. A grade beyond it is an error.
        max_tokens: grade only: longest answer.
        request: fields of the request to add or change; null leaves one out.
        key_env: environment variable that holds the key.
        timeout_s: seconds to wait for an answer.
        retries: further attempts after connection errors, 429 and 5xx, with growing delays.
        concurrency: requests under way at once; a request is one picture.
    """

    name = "vlm"
    license = "of the model"

    def __init__(
        self,
        *,
        url: str,
        model: str,
        mode: Literal["yes_no", "grade"] = "yes_no",
        template: str | None = None,
        pattern: str | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        max_tokens: int | None = None,
        request: Mapping[str, Any] | None = None,
        key_env: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 5,
        concurrency: int = 8,
    ) -> None:
        if mode not in ("yes_no", "grade") or concurrency < 1:
            raise RewardError(
                "vlm needs the mode yes_no or grade, and a concurrency of 1 or more",
                why=f"got mode {mode}, concurrency {concurrency}",
            )
        grade_only = {"pattern": pattern, "minimum": minimum, "maximum": maximum, "max_tokens": max_tokens}
        given = [name for name, value in grade_only.items() if value is not None]
        if mode == "yes_no" and given:
            raise RewardError(f"{given[0]} is an option of vlm's mode grade", hint="add mode: grade")
        self.model, self.mode, self.concurrency = model, mode, concurrency
        low, high = (0.0 if minimum is None else minimum), (10.0 if maximum is None else maximum)
        self.range = (float(low), float(high)) if mode == "grade" else (0.0, 1.0)
        if not self.range[0] < self.range[1]:
            raise RewardError("minimum must be below maximum", why=f"got {low:g} and {high:g}")
        template = template or (GRADE if mode == "grade" else VQASCORE)
        if mode == "grade":
            template = template.replace("{minimum}", f"{low:g}").replace("{maximum}", f"{high:g}")
        self.template, self.needs_prompt = template, "{prompt}" in template
        self.pattern = _compiled(pattern or _GRADE_PATTERN)
        answer: dict[str, Any] = {"max_tokens": 512 if max_tokens is None else max_tokens}
        if mode == "yes_no":
            answer = {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        fields = {"model": model, "temperature": 0, **answer, **(request or {})}
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self.endpoint = Endpoint(
            url, what=f"the judge {model}", token=secret(key_env), timeout_s=timeout_s, retries=retries
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score_pictures(to_pil(images), prompts)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="vlm") as pool:
            futures = [pool.submit(self._judge, *pair) for pair in zip(pictures, prompts, strict=True)]
            try:
                return torch.tensor([future.result() for future in futures], dtype=torch.float32)
            finally:
                pool.shutdown(cancel_futures=True)

    def _judge(self, picture: Image.Image, prompt: str) -> float:
        shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png_base64(picture)}"}}
        question = {"type": "text", "text": self.template.replace("{prompt}", prompt)}
        messages = [{"role": "user", "content": [shown, question]}]
        answer = self.endpoint.call("/chat/completions", {**self.fields, "messages": messages})
        try:
            choice = answer["choices"][0]
            if self.mode == "grade":
                return self._grade(str(choice["message"]["content"] or ""), prompt)
            return self._yes(choice, prompt)
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise self._unreadable("answered in an unknown form", beginning(str(answer)), prompt) from error

    def _grade(self, text: str, prompt: str) -> float:
        matches = self.pattern.findall(text)
        if not matches:
            raise self._unreadable("gave no grade", beginning(text), prompt)
        try:
            grade = float(matches[-1])
        except ValueError:
            raise self._unreadable(f"gave {matches[-1]!r} as a grade", beginning(text), prompt) from None
        low, high = self.range
        if not low <= grade <= high:
            raise self._unreadable(
                f"gave {grade:g} on a scale of {low:g} to {high:g}", beginning(text), prompt
            )
        return grade

    def _yes(self, choice: Mapping[str, Any], prompt: str) -> float:
        logprobs = choice.get("logprobs")
        if not logprobs or not logprobs.get("content"):
            raise RewardError(
                f"{self.endpoint.what} gives no log-probabilities",
                where=self.endpoint.url,
                why=f"asked for logprobs and top_logprobs, got {beginning(str(dict(choice)))}",
                hint="use an endpoint that has them, or mode: grade",
            )
        likely = logprobs["content"][0]["top_logprobs"]
        mass = {"yes": 0.0, "no": 0.0}
        for entry in likely:
            word = str(entry["token"]).strip(_WORD_MARKS).lower()
            if word in mass:
                mass[word] += math.exp(entry["logprob"])
        total = mass["yes"] + mass["no"]
        if not total > 0:
            tokens = beginning(" ".join(str(entry["token"]) for entry in likely))
            raise self._unreadable("answers neither yes nor no", tokens, prompt)
        return mass["yes"] / total

    def _unreadable(self, what: str, answer: str, prompt: str) -> RewardError:
        return RewardError(
            f"{self.endpoint.what} {what}",
            where=f"{self.endpoint.url}, prompt {prompt!r}",
            why=f"its answer begins: {answer}",
            hint="adapt template, pattern, the scale or max_tokens to the model",
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise RewardError(f"{pattern} is no regular expression", why=str(error)) from error
    if compiled.groups != 1:
        raise RewardError(
            "the pattern must have one group, which holds the grade", where=pattern, hint="others: (?:...)"
        )
    return compiled
