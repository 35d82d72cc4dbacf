"""What a card says, section by section, as markdown."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.config import OnlineRun, RewardConfig, Run
from diffalign.layout import FINAL, result_in, run_of
from diffalign.model_card.loading_code import LORA_LOADERS
from diffalign.model_card.result import Result
from diffalign.origins import BaseModel, FileSet, Licence, Origins

NOT_STATED = "not stated by the checkpoint"
NOT_RECORDED = "not recorded by the run"
_FORMS = {
    "pipeline": "A diffusers pipeline",
    "adapter": "A {lora} adapter",
    "peft adapter": "A {lora} adapter in peft's format",
    "adapter file": "A {lora} adapter in one file",
    "checkpoint file": "A checkpoint in one file",
}
_LORA = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
_OF = {"contents": "", "names and sizes": " of names and sizes", "prompts": " of the prompts"}


def title(config: Run) -> str:
    """Base and method."""
    path = Path(config.model.path)
    if result_in(path).name == FINAL:
        name = run_of(path.absolute()).name
    else:
        name = config.model.path.rstrip("/").rpartition("/")[2].removeprefix("bundled:")
    return f"{_text(name.removesuffix('.safetensors'))}, aligned by {config.algorithm.name}"


def what_it_is(result: Result, config: Run, summary: Mapping[str, Any]) -> str:
    """Two sentences: form, base, method and rewards; and how much is known of its pictures."""
    lora = config.model.lora
    form = _FORMS[result.kind].format(lora=_LORA[lora.kind] if lora is not None else "LoRA")
    if result.is_adapter and lora is not None and not (lora.rank_by_module or config.model.adapters):
        form += f" of rank {lora.rank}"
    ways = {"raise": _trained(config, 1), "lower": _trained(config, -1)}
    aims = [f"to {way} {', '.join(labels)}" for way, labels in ways.items() if labels]
    on = f", {' and '.join(aims)}" if aims else ""
    version = summary.get("versions", {}).get("diffalign", "of unknown version")
    first = f"{form} of {_code(config.model.path)}, trained with diffalign {version} by `{config.algorithm.name}`{on}."
    results = summary.get("results") or {}
    if not results:
        return f"{first} It was not evaluated, so what it gained is not known."
    counts = sorted({row["after"]["n"] for rewards in results.values() for row in rewards.values()})
    pictures = " or ".join(f"{count:,}" for count in counts)
    return (
        f"{first} Pictures of the same prompts and seeds were scored before and after, {pictures} of each of "
        f"{len(results)} prompt set{'s' if len(results) > 1 else ''}."
    )


def under_the_picture(config: Run) -> str:
    label = f", with the score of {_code(_label(config.rewards[0]))} below each" if config.rewards else ""
    return f"Before and after: the same prompts and seeds{label}"


def gains(summary: Mapping[str, Any]) -> str:
    """Every reward on every prompt set, in-domain and out-of-domain as the run file names them."""
    if not summary.get("results"):
        return "The run had no evaluation sets: nothing was measured."
    table = importlib.import_module("diffalign_eval.table")
    results = {
        _text(name): {_text(label): row for label, row in rows.items()}
        for name, rows in summary["results"].items()
    }
    text = table.before_after_markdown(table.change_rows(results))
    return f"{text}\nMeans; the change is paired by prompt and seed, with its 95 % interval over prompts."


def rewards(config: Run, origins: Origins | None) -> str:
    if not config.rewards:
        return ""
    licences = origins.rewards if origins is not None else {}
    lines = ["| reward | is | weight in training | licence |", "| --- | --- | ---: | --- |"]
    for reward in config.rewards:
        label = _label(reward)
        weight = f"{reward.weight:g}" if isinstance(config, OnlineRun) else "measured only"
        weight = "watched only" if not reward.weight else weight
        licence = licences.get(label) or NOT_RECORDED
        lines.append(f"| {_text(label)} | {_text(reward.name)} | {weight} | {_text(licence)} |")
    return "\n".join(lines)


def guards(config: Run, summary: Mapping[str, Any]) -> str:
    """The alarms, and whether one of them ended the run."""
    lines = [
        f"- iteration {alarm['iteration']}, `{alarm['name']}`: {_text(alarm['what'])}"
        for alarm in summary.get("alarms", [])
    ]
    if not lines:
        off = config.guards.on_alarm == "off"
        lines = ["They were switched off." if off else "No alarm was raised."]
    ended = summary.get("ended_early")
    if ended:
        lines.append(
            f"\nThe run ended early ({_text(ended['why'])}); these are the weights of iteration "
            f"{ended['weights_of_iteration']}."
        )
    return "\n".join(lines)


def loading_notes(result: Result, config: Run, base: BaseModel | None) -> list[str]:
    """What the code cannot say."""
    notes = []
    if base is None:
        notes.append(
            f"The class of the base model's pipeline is {NOT_RECORDED}; the code lets diffusers choose it."
        )
    elif result.is_adapter and base.root.hub_id is None:
        notes.append("The base model is not on the hub: put your path to it in the place of the one above.")
    if base is not None and result.kind in ("adapter", "adapter file") and base.pipeline in LORA_LOADERS:
        notes.append(
            f"diffusers' own {base.pipeline} does not load LoRAs, so the code takes diffalign's. For plain diffusers: "
            "`diffalign export RUN --format merged`."
        )
    if base is not None and result.kind == "adapter file" and base.pipeline == "StableDiffusion3Pipeline":
        notes.append("diffusers does not read this layout of Stable Diffusion 3; ComfyUI does.")
    if config.evaluation.sampler.kind in ("flow_sde", "cps", "dance_sde"):
        notes.append(
            f"The pictures above were drawn by the stochastic sampler {config.evaluation.sampler.kind}, which "
            "diffusers does not have; the code draws with the pipeline's own."
        )
    return notes


def made_from(config: Run, origins: Origins | None, licence: Licence) -> str:
    """Base model, adapters and data: hashes and licences."""
    lines = ["| | from | SHA-256 | licence |", "| --- | --- | --- | --- |"]
    if origins is None:
        lines.append(f"| base model | {_code(config.model.path)} | {NOT_RECORDED} | {_licence(licence)} |")
        return "\n".join(lines)
    base: BaseModel | None = origins.base
    what = "base model"
    while base is not None:
        lines.append(_row(what, base.files, NOT_STATED, _on_the_hub(base)))
        base, what = base.trained_from, "which was trained from"
    lines += [_row(option, files, NOT_STATED) for option, files in origins.adapters.items()]
    lines += [_row(option, files, "not stated") for option, files in origins.data.items()]
    return "\n".join(lines)


def cost(summary: Mapping[str, Any]) -> str:
    joules = summary.get("energy_joules")
    energy = f"{joules:,} J" if joules is not None else f"not known: {summary.get('energy_reason')}"
    processes = summary.get("processes", 1)
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    rows = {
        "time": f"{minutes:,} min {seconds} s",
        "device": summary.get("device", "unknown") + (f", {processes} processes" if processes > 1 else ""),
        "precision": {"no": "float32"}.get(summary["precision"], summary["precision"]),
        "peak memory": f"{summary['peak_memory_bytes'] / 1e9:.2f} GB",
        "energy": energy,
        **{name.replace("_", " "): f"{count:,}" for name, count in summary.get("counts", {}).items()},
    }
    return "\n".join(
        ["| | |", "| --- | --- |", *(f"| {name} | {_text(value)} |" for name, value in rows.items())]
    )


def made(config: Run, summary: Mapping[str, Any]) -> str:
    """Method, iterations, seed, versions and the command."""
    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    program, *words = summary.get("command") or ["unknown"]
    program = "python -m diffalign" if Path(program).name == "__main__.py" else Path(program).name
    lines = [
        f"- method: `{config.algorithm.name}`, {summary.get('iterations', 'unknown')} iterations",
        f"- seed: {config.seed}",
        f"- versions: {versions or 'unknown'}",
        f"- command:\n\n{fenced(f'{program} {shlex.join(words)}', 'bash')}",
    ]
    return "\n".join(lines)


def fenced(text: str, language: str) -> str:
    """A code block that nothing inside can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _row(what: str, files: FileSet, no_licence: str, place: str = "") -> str:
    number = f"{files.count:,} {'prompts' if files.of == 'prompts' else 'files'}, " if files.count > 1 else ""
    place = place or f"{_code(files.path)} ({number}{files.size:,} bytes)"
    mark = f"`{files.sha256}`{_OF[files.of]}" if files.sha256 else "not known: the files could not be read"
    return f"| {_text(what)} | {place} | {mark} | {_licence(files.licence, no_licence)} |"


def _on_the_hub(base: BaseModel) -> str:
    if base.hub_id is None:
        return ""
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id}), commit `{base.commit}`"


def _licence(licence: Licence, none: str = NOT_STATED) -> str:
    words = " ".join(filter(None, [licence.name, f"({licence.title})" if licence.title else None]))
    if not words and licence.file is not None:
        words = f"see {Path(licence.file).name}"
    return _text(words or none)


def _label(reward: RewardConfig) -> str:
    return reward.label or reward.name


def _trained(config: Run, sign: int) -> list[str]:
    """Labels of the rewards that training followed upwards (1) or downwards (-1)."""
    rewards = config.rewards if isinstance(config, OnlineRun) else []
    return [_code(_label(reward)) for reward in rewards if reward.weight * sign > 0]


def _text(text: str) -> str:
    """Words that come from elsewhere, in one line that markdown and HTML read as nothing but words."""
    escaped = re.sub(r"[\\`*\[\]<>]", r"\\\g<0>", " ".join(text.split()))
    return escaped.replace("|", "&#124;")  # which ends no cell, whoever writes the table


def _code(text: str) -> str:
    """The same as code, in which backticks are nothing but themselves."""
    line = " ".join(text.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    around, gap = "`" * (longest + 1), " " if longest else ""
    return f"{around}{gap}{line}{gap}{around}"
