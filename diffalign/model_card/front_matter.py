"""The YAML at the head of a card, by which the hub files and shows a model."""

from __future__ import annotations

import re
from typing import Any

import yaml

from diffalign.config import Run
from diffalign.model_card.result import Result
from diffalign.origins import BaseModel, Licence

UNKNOWN = "unknown"
"""The hub's own word for a licence that is not stated."""
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_FAMILY_TAGS = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "FluxPipeline": "flux",
    "PixArtSigmaPipeline": "pixart-sigma",
    "SanaPipeline": "sana",
    "ZImagePipeline": "z-image",
}


def front_matter(result: Result, config: Run, base: BaseModel | None, licence: Licence) -> str:
    """YAML, without its rules of dashes.

    `base_model` is there only where the chain of runs began with a model of the hub: the hub takes nothing else.
    """
    tree: dict[str, Any] = _licence(licence, base)
    root = base.root if base is not None else None
    if root is not None and root.hub_id is not None:
        tree["base_model"] = root.hub_id
    tree["base_model_relation"] = "adapter" if result.is_adapter else "finetune"
    tree["library_name"] = "diffusers"
    tree["pipeline_tag"] = "text-to-image"
    tree["instance_prompt"] = None
    pipeline = result.pipeline or (base.pipeline if base is not None else None)
    tags = ["text-to-image", "diffusers", _FAMILY_TAGS.get(pipeline or "")]
    tags += ["lora" if result.is_adapter else None, "diffalign", config.algorithm.name]
    tree["tags"] = [tag for tag in tags if tag]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)


def _licence(licence: Licence, base: BaseModel | None) -> dict[str, str]:
    """The base model's: what is made from it is under its terms. Words that are no identifier are `other`."""
    name, title, link = licence.name, licence.title, licence.link
    if name is None:
        if licence.file is None:
            return {"license": UNKNOWN}
        name, title, link = "other", title or "see-licence-file", link or licence.file.rpartition("/")[2]
    elif not _IDENTIFIER.fullmatch(name):
        name, title = "other", re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")
    if link is not None and "://" not in link and base is not None and base.root.hub_id is not None:
        link = f"https://huggingface.co/{base.root.hub_id}/blob/main/{link.removeprefix('./')}"
    found = {"license": name, "license_name": title, "license_link": link}
    return {key: value for key, value in found.items() if value is not None}
