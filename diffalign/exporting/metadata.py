"""What the header of an exported file says: modelspec.* of Stability AI's specification 1.0.1, ss_* as kohya's
sd-scripts write them, and diffalign.* of ours. Facts only: what is not known is left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from diffalign import __version__
from diffalign.config_file import dump_config
from diffalign.exporting.kohya import KOHYA
from diffalign.exporting.source import Loaded
from diffalign.origins import read_origins
from diffalign.redaction import redact

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
_SD3_REFERENCE = "https://github.com/Stability-AI/sd3-ref"
_SGM = "https://github.com/Stability-AI/generative-models"
_ORIGINAL = {
    "StableDiffusion": _SGM,
    "StableDiffusionXL": _SGM,
    "StableDiffusion3": _SD3_REFERENCE,
    "Flux": "https://github.com/black-forest-labs/flux",
}


def header(loaded: Loaded, *, original: bool, adapter: bool) -> dict[str, str]:
    """`modelspec.*` and `diffalign.*`.

    Args:
        original: the names are those of the original implementation, not diffusers'.
        adapter: the file holds a LoRA, not a model.
    """
    return {"format": "pt", **_modelspec(loaded, original, adapter), **_ours(loaded)}


def kohya_header(loaded: Loaded, sizes: Collection[tuple[int, float]]) -> dict[str, str]:
    """`ss_*` of a LoRA in kohya's layout.

    Args:
        sizes: each (rank, alpha) of its modules.
    """
    ranks, alphas = {rank for rank, _ in sizes}, {alpha for _, alpha in sizes}
    result = loaded.result
    height, width = loaded.denoiser.size
    is_v2 = architecture(loaded) in ("stable-diffusion-v2-512", "stable-diffusion-v2-768-v")
    bases = {"StableDiffusionXL": "sdxl_base_v1-0", "StableDiffusion3": "sd3", "Flux": "flux1"}
    return {
        "ss_network_module": KOHYA[loaded.family].module,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": bases.get(loaded.family, "sd_v2" if is_v2 else "sd_v1"),
        "ss_v2": str(is_v2),
        "ss_sd_model_name": result.config.model.path.rstrip("/").rsplit("/", 1)[-1],
        "ss_output_name": result.name,
        "ss_resolution": f"({width}, {height})",
        "ss_seed": str(result.config.seed),
    }


def architecture(loaded: Loaded) -> str | None:
    """The specification's id of the base model's architecture; None where it has none."""
    network = loaded.network.config
    match loaded.family:
        case "StableDiffusion":
            if loaded.pipeline.text_encoder.config.hidden_act == "quick_gelu":
                return "stable-diffusion-v1"
            return f"stable-diffusion-v2-{'768-v' if _prediction(loaded) == 'v' else '512'}"
        case "StableDiffusionXL":
            return "stable-diffusion-xl-v1-base"
        case "StableDiffusion3":
            kinds = {True: "5-medium", False: "5-large" if network.qk_norm else "m"}
            return f"stable-diffusion-3-{kinds[bool(network.dual_attention_layers)]}"
        case "Flux":
            return f"flux-1-{'dev' if network.guidance_embeds else 'schnell'}"
    return None


def _modelspec(loaded: Loaded, original: bool, adapter: bool) -> dict[str, str]:
    known = architecture(loaded)
    result = loaded.result
    made = datetime.fromtimestamp(result.weights.stat().st_mtime, UTC)
    height, width = loaded.denoiser.size
    origins = read_origins(result.run)
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": known and f"{known}/lora" if adapter else known,
        "implementation": _ORIGINAL[loaded.family] if original else "diffusers",
        "title": result.name,
        "date": made.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "resolution": f"{width}x{height}",
        "prediction_type": _prediction(loaded),
        "license": None if origins is None else origins.base.root.files.licence.name,
    }
    return {f"modelspec.{name}": redact(value) for name, value in found.items() if value}


def _ours(loaded: Loaded) -> dict[str, str]:
    result = loaded.result
    rewards = [
        {"name": reward.label or reward.name, "weight": reward.weight} for reward in result.config.rewards
    ]
    found: dict[str, str | None] = {
        "version": __version__,
        "method": result.config.algorithm.name,
        "rewards": json.dumps(rewards),
        "weights": result.weights.name,
        "config": dump_config(result.config),
    }
    origins = read_origins(result.run)
    if origins is not None:
        found["base_hash"] = origins.base.files.sha256
        found["data_hash"] = json.dumps({option: files.sha256 for option, files in origins.data.items()})
    return {f"diffalign.{name}": redact(value) for name, value in found.items() if value is not None}


def _prediction(loaded: Loaded) -> str | None:
    kind: Any = getattr(loaded.denoiser.schedule, "prediction_type", None)
    return _PREDICTIONS.get(kind)
