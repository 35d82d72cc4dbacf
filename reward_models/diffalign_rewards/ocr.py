"""Whether the picture shows the text that its prompt quotes, read by RapidOCR (PP-OCR models, in its wheel)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DataError, RewardError
from diffalign.images import to_pil
from diffalign.rewards import RewardModel

_QUOTED = re.compile('"([^"]*)"|\u201c([^\u201d]*)\u201d|\u00ab([^\u00bb]*)\u00bb')


class OCRReward(RewardModel):
    """Agreement of the text in the picture with the text quoted in the prompt, 0 to 1.

    1 - min(d, n) / n, where d is the edit distance between the two and n the length of the quoted text; letter case
    and spaces are ignored. Several quoted texts count as one, in the order of the prompt; the picture is read from
    top to bottom. Text beyond the quoted one costs as much as missing text.
    """

    name = "ocr"
    range = (0.0, 1.0)
    license = "Apache-2.0"

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise RewardError(
                "the reward ocr needs RapidOCR and onnxruntime",
                why=str(error),
                hint="pip install 'diffalign[ocr]'",
            ) from error
        self._engine = RapidOCR(params={"Global.log_level": "error"})

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score_pictures(to_pil(images), prompts)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        wanted = [quoted_text(prompt) for prompt in prompts]
        read = [self._read(picture) for picture in pictures]
        return torch.tensor([agreement(*texts) for texts in zip(read, wanted, strict=True)])

    def _read(self, picture: Image.Image) -> str:
        try:
            return "".join(self._engine(picture).txts or ())
        except Exception as error:
            last = str(error).strip().split("\n")[-1]
            raise RewardError(
                "RapidOCR failed on a picture",
                where=f"{picture.width} x {picture.height} pixels",
                why=f"{type(error).__name__}: {last}",
            ) from error


def quoted_text(prompt: str) -> str:
    """What stands between double quotation marks in the prompt; several texts are joined.

    Raises:
        DataError: there is none.
    """
    text = "".join("".join(groups) for groups in _QUOTED.findall(prompt))
    if not _normalised(text):
        raise DataError(
            f"the reward ocr finds no quoted text in the prompt {prompt!r}",
            hint='write the text to be shown in double quotation marks: a sign that says "OPEN"',
        )
    return text


def agreement(read: str, wanted: str) -> float:
    """1 - min(d, n) / n, as the class says."""
    read, wanted = _normalised(read), _normalised(wanted)
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of a character that turn one into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def _normalised(text: str) -> str:
    return "".join(text.casefold().split())
