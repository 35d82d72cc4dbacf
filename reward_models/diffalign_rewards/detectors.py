"""Objects in pictures, found by a service or by a detection model of transformers: what GenEval's rules look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.data.geneval import THRESHOLD, Detection
from diffalign.errors import RewardError, first_line
from diffalign_rewards.backbone import BackboneSpec, shared_backbone
from diffalign_rewards.remote import Endpoint, beginning, png_base64, secret

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""Those that GenEval asks for."""
RENAMED = {"remote": "tv remote", "mouse": "computer mouse", "keyboard": "computer keyboard"}
"""Classes of COCO that GenEval's prompts call otherwise."""


class Detector(ABC):
    """Finds objects and their colours."""

    @abstractmethod
    def __call__(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        """The objects of B RGB pictures, in any order; boxes in pixels. Raises RewardError."""


class DetectionService(Detector):
    """A service that takes `{"images": [PNG in base64, ...]}` at /detect, and gives

        {"results": [{"detections": [{"label": "bus", "score": 0.97, "box": [10, 20, 200, 180], "color": "red"}]}, ...]}

    Args:
        url, token_env, timeout_s, retries: as in the reward `http`.
    """

    def __init__(
        self, url: str, *, token_env: str | None = None, timeout_s: float = 60.0, retries: int = 5
    ) -> None:
        what = f"the detection service at {url}"
        self.endpoint = Endpoint(
            url, what=what, token=secret(token_env), timeout_s=timeout_s, retries=retries
        )

    def __call__(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        answer = self.endpoint.call("/detect", {"images": [png_base64(picture) for picture in pictures]})
        try:
            found = [[_detection(entry) for entry in one["detections"]] for one in answer["results"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RewardError(
                f"{self.endpoint.what} gave no detections",
                why=f"{type(error).__name__}: {error}; its answer begins: {beginning(str(answer))}",
                hint='the answer must be {"results": [{"detections": [{"label", "score", "box", "color"}]}]}',
            ) from error
        if len(found) != len(pictures):
            raise RewardError(
                f"{self.endpoint.what} answered for {len(found)} of {len(pictures)} pictures",
                hint="one entry of results for each picture, in their order",
            )
        return found


class LocalDetector(Detector):
    """An object-detection model of transformers trained on COCO, with CLIP for the colours.

    Args:
        model: a folder or hub id, e.g. facebook/detr-resnet-101.
        clip: names an object's colour from its box: the nearest of "a photo of a COLOUR CLASS".
        device: where to compute.

    Raises:
        RewardError: there is no such model, or it is none that detects.
    """

    def __init__(self, model: str, clip: BackboneSpec, device: str | torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        options: dict[str, Any] = {"local_files_only": Path(model).expanduser().exists()}
        try:
            self.processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False, **options)
            network = AutoModelForObjectDetection.from_pretrained(
                model, use_safetensors=True, trust_remote_code=False, **options
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise RewardError(
                f"cannot load the detector {model}",
                why=first_line(error),
                hint="give an object-detection model of transformers with safetensors weights, "
                "e.g. facebook/detr-resnet-101, or a detection service with url",
            ) from error
        self.device = torch.device(device)
        self.network = network.requires_grad_(False).eval().to(self.device)
        self.names = {int(k): RENAMED.get(v, v) for k, v in self.network.config.id2label.items()}
        self.clip = shared_backbone(clip, device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
        sizes = [(picture.height, picture.width) for picture in pictures]
        results = self.processor.post_process_object_detection(
            self.network(**inputs), threshold=THRESHOLD, target_sizes=sizes
        )
        return [self._objects(picture, found) for picture, found in zip(pictures, results, strict=True)]

    def _objects(self, picture: Image.Image, found: dict[str, torch.Tensor]) -> list[Detection]:
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [
            Detection(self.names[label], score, tuple(box), self._colour(picture, box, self.names[label]))
            for label, score, box in rows
        ]

    def _colour(self, picture: Image.Image, box: Sequence[float], label: str) -> str:
        left, top = max(0, int(box[0])), max(0, int(box[1]))
        right = min(picture.width, max(left + 1, round(box[2])))
        bottom = min(picture.height, max(top + 1, round(box[3])))
        crop = picture.crop((min(left, right - 1), min(top, bottom - 1), right, bottom))
        texts = self.clip.embed_texts([f"a photo of a {colour} {label}" for colour in COLOURS])
        return COLOURS[int((texts @ self.clip.embed_images([crop])[0]).argmax())]


def _detection(entry: Any) -> Detection:
    left, top, right, bottom = (float(value) for value in entry["box"])
    colour = entry.get("color")
    if not isinstance(entry["label"], str) or not (colour is None or isinstance(colour, str)):
        raise ValueError(f"label and color must be text, not {entry!r}")
    return Detection(entry["label"], float(entry["score"]), (left, top, right, bottom), colour)
