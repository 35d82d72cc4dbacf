"""Draw pictures for a list of prompts.

Writes 00000-s0.png, ... and metadata.jsonl (file_name, prompt, seed) into a new folder, the layout that
`diffalign score` and SFT training read. A picture depends on its prompt and seed only, never on its batch.

--align METHOD:OPTION=VALUE,...,reward=NAME makes better pictures from the same weights, for more work each; what was
done, and what it cost, is written to alignment.json. Rewards are named as in `diffalign score`, `reward=` may come
several times, and NAME.OPTION=VALUE is an option of a reward, NAME.weight=0.5 its weight. Methods and their options:

  best-of-n    n=8                                             keep the best of n pictures
  fk-steering  particles=4 temperature=0.1 potential=max       resample trajectories by their predicted pictures;
               steps=4/8/12 resampling=systematic              needs --eta above 0
               threshold=0.5 choice=best
  svdd         candidates=8 temperature=0 steps=6/7/8          choose between candidates in every step; needs --eta
  dno          steps=20 learning_rate=0.01 regularization=0.1  optimise the noise; needs a differentiable reward
               permutations=16

examples:
  diffalign sample --model bundled:tiny-sd --prompts "a red star above a blue circle" --output-dir out
  diffalign sample --model runs/ddpo --prompts bundled:prompts/shapes_eval.txt --limit 16 --output-dir out
  diffalign sample --model sd15.safetensors --prompts prompts.jsonl --seeds-per-prompt 4 --output-dir out
  diffalign sample --model sd15.safetensors --adapter style.safetensors:0.7 --prompts prompts.txt --output-dir out
  diffalign sample --model runs/dpo --negative runs/npo --guidance-scale 5 --prompts prompts.txt --output-dir out
  diffalign sample --model bundled:tiny-sd --prompts "two red stars" --align best-of-n:n=8,reward=shapes \\
      --output-dir out
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffalign.cli.sampling_args import SamplingArgs, optional, picture_size, run_behind

if TYPE_CHECKING:
    from diffalign.config import AdapterConfig

ALIGNMENT = "alignment.json"
PROMPT_FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""A name that ends like this is a file, there or not: a misspelt one must not become the prompt."""


@dataclass(frozen=True)
class Args:
    model: str
    """A run folder, its final/ or one of its checkpoints/step-N, a diffusers folder, a hub id, a .safetensors file, or
    bundled:tiny-sd."""
    prompts: str
    """A prompt file (.txt one a line, .jsonl, .csv, .tsv, .parquet, or bundled:...), prompts:SET, or the prompt
    itself."""
    output_dir: Path
    """A new folder for the pictures."""
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, optional("PATH[:WEIGHT]")] = ()
    """A LoRA to add to the model, and how much of it (1): a .safetensors file of diffusers or kohya, a folder with one,
    a PEFT folder, a finished run, a hub id. May come several times."""
    negative: Annotated[str | None, optional("PATH")] = None
    """A checkpoint trained with the loss npo: guidance starts at its prediction without a prompt, instead of the
    model's own."""
    align: Annotated[str | None, optional("METHOD:OPTION=VALUE,...")] = None
    """Align the pictures at test time (see above), e.g. best-of-n:n=8,reward=shapes."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingArgs] = field(default_factory=SamplingArgs)


def run(args: Args) -> None:
    """Sample every prompt; nothing is left in `output_dir` unless all went well."""
    from diffalign.cli.alignment_args import parse_alignment

    options = args.sampling
    adapters = [parse_adapter(text) for text in args.adapter]
    sampler = options.sampler(run_behind([args.model]), args.model)
    alignment = None if args.align is None else parse_alignment(args.align)
    if alignment is not None:
        alignment.require(sampler)

    from rich.console import Console
    from rich.progress import track

    from diffalign.models.loading import pick_device
    from diffalign.picture_folder import draw_pictures, plan_pictures
    from diffalign.result_folder import result_folder
    from diffalign.sampling import generate, guide_away_from
    from diffalign.test_time.aligner import Aligner
    from diffalign.training.policies import load_policy

    prompts = read_prompts(args.prompts, options.limit)
    specs = plan_pictures(prompts, options.seeds_per_prompt, options.seed)
    with result_folder(args.output_dir) as folder:
        aligner = None if alignment is None else Aligner(alignment, pick_device(options.device))
        denoiser, *negatives = (
            load_policy(
                path,
                device=options.device,
                mixed_precision=options.mixed_precision,
                resolution=picture_size(options.resolution),
                adapters=adapters if path == args.model else (),
            )
            for path in (args.model, args.negative)
            if path is not None
        )
        for negative in negatives:
            guide_away_from(denoiser, negative, sampler)
        draw = generate if aligner is None else aligner.draw
        batches = draw_pictures(denoiser, specs, sampler, options.batch_size, folder, draw)
        total = -(-len(specs) // options.batch_size)
        for _ in track(batches, "sampling", total=total, console=Console(stderr=True), transient=True):
            pass
        if aligner is not None:
            (folder / ALIGNMENT).write_text(json.dumps(aligner.to_json(), indent=1) + "\n", encoding="utf-8")
    Console().print(f"{len(specs)} pictures of {len(prompts)} prompts in {args.output_dir}", soft_wrap=True)


def parse_adapter(text: str) -> AdapterConfig:
    """`PATH` or `PATH:WEIGHT`. Raises ConfigError for a weight of 0, or no path."""
    from diffalign.config import AdapterConfig
    from diffalign.errors import ConfigError

    path, colon, last = text.rpartition(":")
    try:
        weight = float(last)
    except ValueError:
        colon = ""
    path, weight = (path, weight) if colon else (text, 1.0)
    if not path or weight == 0 or not math.isfinite(weight):
        raise ConfigError(f"--adapter {text!r} is not PATH or PATH:WEIGHT, with a weight other than 0")
    return AdapterConfig(path=path, weight=weight)


def read_prompts(source: str, limit: int | None) -> list[str]:
    """The prompts of a file, or `source` itself where it neither is nor looks like one.

    Raises:
        DataError: no such file, or no prompt in it.
    """
    from diffalign.data.prompts import load_prompts
    from diffalign.errors import DataError

    looks_like_file = source.lower().endswith(PROMPT_FILES) or source.startswith(("bundled:", "prompts:"))
    if looks_like_file or Path(source).is_file():
        return load_prompts(source, limit)
    if not source.strip():
        raise DataError(
            "the prompt is empty", where="--prompts", hint="write a prompt, or name a prompt file"
        )
    return [source.strip()]
