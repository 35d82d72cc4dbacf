"""Whether the files of a checkpoint hold just the weights of its networks: none damaged, drawn at random or left over.

diffusers and transformers only log a weight that they do not find, and start it at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from diffalign.errors import CheckpointError

RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names in the attention of old autoencoders -> as diffusers loads them."""
_SHOWN = 3


def require_readable(folder: Path) -> None:
    """Open the header of every safetensors file in `folder`, and look for the files that its indexes list.

    Raises:
        CheckpointError: a file is damaged, or a shard is not there.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            _names_in(file)
        except SafetensorError as error:
            raise CheckpointError(
                f"{file.name} is damaged",
                where=str(file),
                why=str(error),
                hint="it was cut off or changed on its way: download or export it again",
            ) from error
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        absent = sorted({name for name in _shards(index) if not (folder / name).is_file()})
        if absent:
            raise CheckpointError(
                f"{folder.name} lacks {len(absent)} of its weight files: {_some(absent)}",
                where=str(index),
                hint="download or copy the folder again",
            )


def require_all_weights(pipeline: Any, names: Iterable[str], variant: str | None) -> None:
    """Compare the networks of a pipeline that was just loaded with the files that they come from.

    What a text encoder's files hold besides is no error (a T5 may come with its decoder); transformers names it.

    Args:
        names: the pipeline's names of its networks.
        variant: of the weight files; a network without files of it has others.

    Raises:
        CheckpointError: weights that the files lack, or that the denoising network or the VAE has no place for.
    """
    for name in names:
        network, left_over = getattr(pipeline, name), list[str]()
        if network is None:
            continue
        if hasattr(network.config, "quantization_config"):
            raise CheckpointError(
                f"the weights of the {name} are stored quantised",
                where=str(pipeline.config.get("_name_or_path")),
                why="weights are read as they were trained, and rounded here where that is asked for",
                hint="give the plain checkpoint, with model.quantization: int8 or nf4",
            )
        if isinstance(network, PreTrainedModel):
            folder = Path(network.name_or_path)
            missing = _missing_of_encoder(network, folder, variant)
        else:
            folder = Path(network.config["_name_or_path"])
            missing, left_over = _missing_and_left_over(network, stored_names(folder, variant))
        require_match(name, missing, left_over, folder)


def require_tokenizers(pipeline: Any, encoders: Iterable[str]) -> None:
    """transformers makes an empty tokenizer, to which all prompts are alike, of a folder that lacks its vocabulary.

    Raises:
        CheckpointError: a tokenizer that cannot tell two letters apart.
    """
    for encoder in encoders:
        name = encoder.replace("text_encoder", "tokenizer")
        tokenizer = getattr(pipeline, name)
        if tokenizer is not None and tokenizer("a").input_ids == tokenizer("b").input_ids:
            raise CheckpointError(
                f"the {name} has no vocabulary",
                where=tokenizer.name_or_path or None,
                why="its files are missing or were not saved whole, and every prompt would be the same",
                hint=f"copy the {name} folder of the base model",
            )


def require_match(name: str, missing: list[str], left_over: list[str], where: Path) -> None:
    if missing:
        raise CheckpointError(
            f"the {name} lacks {len(missing)} of its weights: {_some(missing)}",
            where=str(where),
            why="they would be random numbers",
            hint="its weights and its config.json do not belong together, or were not saved whole: get it again",
        )
    if left_over:
        raise CheckpointError(
            f"the {name} has {len(left_over)} weights that its model has no place for: {_some(left_over)}",
            where=str(where),
            why="its config.json describes another model than its weights are of",
            hint="get both from the same place; weights of something else beside it must be taken out of the file",
        )


def stored_names(folder: Path, variant: str | None) -> set[str]:
    """Names of the weights in those files of `folder` that diffusers or transformers load."""
    for middle in [f".{variant}", ""] if variant else [""]:
        for stem in ("model", "diffusion_pytorch_model"):
            indexes = (f"{stem}.safetensors.index{middle}.json", f"{stem}{middle}.safetensors.index.json")
            for index in indexes:
                if (folder / index).is_file():
                    shards = _shards(folder / index)
                    return {name for shard in shards for name in _names_in(folder / shard)}
            if (folder / f"{stem}{middle}.safetensors").is_file():
                return _names_in(folder / f"{stem}{middle}.safetensors")
    raise CheckpointError("no safetensors weights", where=str(folder))


def _shards(index: Path) -> set[str]:
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


def _names_in(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def _missing_and_left_over(network: Any, stored: set[str]) -> tuple[list[str], list[str]]:
    expected = set(network.state_dict())
    found = {name if name in expected else _renamed(name) for name in stored}
    ignored = getattr(type(network), "_keys_to_ignore_on_load_unexpected", None) or ()
    left_over = {name for name in found - expected if not any(re.search(p, name) for p in ignored)}
    return sorted(expected - found), sorted(left_over)


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def _missing_of_encoder(encoder: PreTrainedModel, folder: Path, variant: str | None) -> list[str]:
    """Asked of transformers, which knows older names, unless all names are plainly there."""
    start = f"{encoder.base_model_prefix}."
    tied = set(getattr(encoder, "all_tied_weights_keys", ()))
    expected = {name.removeprefix(start) for name in set(encoder.state_dict()) - tied}
    stored = stored_names(folder, variant)
    if expected <= {name.removeprefix(start) for name in stored}:
        return []
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report was written when the encoder was loaded
    try:
        has_variant = variant is not None and any(f".{variant}" in file.name for file in folder.iterdir())
        _, found = type(encoder).from_pretrained(
            folder,
            device_map="meta",
            use_safetensors=True,
            output_loading_info=True,
            variant=variant if has_variant else None,
        )
    finally:
        transformers_logging.set_verbosity(level)
    return sorted(found["missing_keys"])


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
