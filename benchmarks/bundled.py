"""How fast the bundled checkpoint samples, is scored, and trains: one table, medians of repeats.

    python benchmarks/bundled.py [--threads 2]

Takes a minute or two on two cores. Another checkpoint of that size: --model FOLDER.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    Data,
    Row,
    hide_progress_bars,
    machine,
    median_seconds,
    print_table,
    time_iterations,
    write_data,
)

from diffalign.config import (
    DDPOConfig,
    DDPORun,
    DPOConfig,
    DPORun,
    ImagesConfig,
    LoRAConfig,
    ModelConfig,
    PairsConfig,
    PromptsConfig,
    RewardConfig,
    SamplerConfig,
    SFTConfig,
    SFTRun,
    TrainingConfig,
)
from diffalign.data.shapes import draw_prompts, draw_scene, render
from diffalign.errors import DiffalignError
from diffalign.images import to_tensor
from diffalign.models.loading import load_denoiser
from diffalign.rewards import RewardMixture, load_reward
from diffalign.sampling import generate
from diffalign.trajectory import rollout

CPU = torch.device("cpu")
REWARDS = {
    "shapes verifier": RewardConfig(name="shapes"),
    "clip (bundled)": RewardConfig(name="clip", options={"checkpoint": "bundled:clip"}),
}
DDPO_STEPS = 10


def main() -> None:
    arguments = parse_arguments()
    hide_progress_bars()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.model}: {machine(CPU)}\n")
    rows = [*sampling(arguments), *scoring(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data", arguments.batch_size)
        for lora in (LoRAConfig(), None):
            rows += training(arguments, data, lora)
    print_table(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--model", default="bundled:tiny-sd", help="what model.path takes")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per denoiser call")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per median")
    return parser.parse_args()


def sampling(arguments: argparse.Namespace) -> list[Row]:
    """Encoding, denoising with and without guidance, decoding, and all of it together."""
    denoiser = load_denoiser(ModelConfig(path=arguments.model))
    batch = arguments.batch_size
    prompts, seeds = draw_prompts(batch, "train", seed=0), list(range(batch))
    unseen = ([f"{prompt} {i}" for prompt in prompts] for i in itertools.count())  # known ones are remembered
    conditioning = denoiser.encode_prompts(prompts)
    noise = torch.randn(batch, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    pictures = torch.rand(batch, 3, *denoiser.size)
    work: dict[str, Callable[[], object]] = {
        "encode prompts": lambda: denoiser.encode_prompts(next(unseen)),
        "encode pictures (VAE)": lambda: denoiser.encode_images(pictures),
    }
    for steps, scale in itertools.product((10, 20), (1.0, 5.0)):
        sampler = denoiser.make_sampler(SamplerConfig(steps=steps, eta=1.0, guidance_scale=scale))
        guidance = "no guidance" if scale == 1.0 else f"guidance {scale:g}"
        work[f"denoise, {steps} steps, {guidance}"] = lambda sampler=sampler: list(
            rollout(denoiser, conditioning, sampler, seeds)
        )
    work["decode (VAE)"] = lambda: denoiser.decode(noise)
    whole = SamplerConfig(steps=20, eta=0.0, guidance_scale=5.0)
    work["prompts to pictures, 20 steps, guidance 5"] = lambda: generate(
        denoiser, prompts, seeds, whole, batch
    )
    with torch.no_grad():
        return [
            Row(phase, batch, median_seconds(call, CPU, repeats=arguments.repeats))
            for phase, call in work.items()
        ]


def scoring(arguments: argparse.Namespace) -> list[Row]:
    """Each reward on rendered scenes; one that cannot be loaded is named and left out."""
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, "train") for _ in range(arguments.batch_size)]
    pictures = to_tensor([render(scene, rng) for scene in scenes])
    prompts = [scene.caption() for scene in scenes]
    rows = []
    for label, spec in REWARDS.items():
        try:
            reward = load_reward(spec.name, **spec.options)
        except DiffalignError as error:
            print(f"reward {label} is not measured: {error.what}\n")
            continue
        seconds = median_seconds(partial(reward, pictures, prompts), CPU, repeats=arguments.repeats)
        rows.append(Row(f"reward: {label}", len(prompts), seconds))
    return rows


def training(arguments: argparse.Namespace, data: Data, lora: LoRAConfig | None) -> list[Row]:
    """One optimizer step of each method on as many pictures; DDPO's sampling and reward are rows of their own."""
    model = ModelConfig(path=arguments.model, lora=lora)
    denoiser = load_denoiser(model, trainable=True)
    denoiser.keep_reference()
    batch = arguments.batch_size
    how = {"training": TrainingConfig(iterations=arguments.repeats + 1, device="cpu", learning_rate=1e-6)}
    sft = SFTRun(
        algorithm=SFTConfig(batch_size=batch), data=ImagesConfig(path=str(data.images)), model=model, **how
    )
    dpo = DPORun(
        algorithm=DPOConfig(batch_size=batch // 2, validation_every=0),
        data=PairsConfig(path=str(data.pairs), validation_fraction=0.0),
        model=model,
        **how,
    )
    ddpo = DDPORun(
        algorithm=DDPOConfig(
            prompts_per_iteration=batch // 2,
            group_size=2,
            updates_per_epoch=1,
            sample_batch_size=batch,
            train_batch_size=batch,
            ratio_check="warn",
        ),
        data=PromptsConfig(path=str(data.prompts)),
        sampler=SamplerConfig(steps=DDPO_STEPS, guidance_scale=1.0),
        rewards=[REWARDS["shapes verifier"]],
        model=model,
        **how,
    )
    weights = "all weights" if lora is None else f"LoRA rank {lora.rank}"
    rows = []
    for run, pictures in ((sft, batch), (dpo, batch // 2 * 2)):
        seconds = time_iterations(run, denoiser, None).seconds["iteration"]
        rows.append(Row(f"{run.algorithm.name} step, {weights}", pictures, seconds))
    phases = time_iterations(ddpo, denoiser, RewardMixture(ddpo.rewards)).seconds
    for phase in ("sampling", "reward", "training", "iteration"):
        rows.append(Row(f"ddpo {phase}, {DDPO_STEPS} steps, {weights}", batch // 2 * 2, phases[phase]))
    return rows


if __name__ == "__main__":
    main()
