"""How much work each method does: see `Work`. `tests/estimate/test_methods.py` compares it with what they do.

The figures are those of a whole iteration after the first, with one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any

from diffalign.algorithms.assignment import trainable_steps
from diffalign.algorithms.latents import ENCODE_BATCH
from diffalign.config import Run
from diffalign.data.ranked import names_prompts
from diffalign.estimate.work import Sampling, Work
from diffalign.models.base import Denoiser


def work_of(config: Run, denoiser: Denoiser) -> Work:
    """The work of a run's method. Raises ConfigError for a sampler that this checkpoint cannot have."""
    work = _METHODS[config.algorithm.name](config, denoiser)
    return replace(work, reference=work.reference or config.training.preview_every > 0)


def _drawn(config: Any, pictures: float, share: float = 1.0) -> Sampling:
    """Whole pictures, all of them decoded; `share` of the denoiser's work is done."""
    size = max(1, min(config.algorithm.sample_batch_size, ceil(pictures)))
    steps, guidance = config.sampler.steps, config.sampler.guidance_scale
    return Sampling(size, pictures * steps * share, pictures, size, guidance)


def _given(config: Any, pictures: int) -> dict[str, Any]:
    """Given pictures: encoded once at the start, or whenever they are used."""
    cached = config.data.cache_latents
    return {"encoded_at_once": ENCODE_BATCH, "encoded": 0.0 if cached else float(pictures)}


def _sft(config: Any, denoiser: Denoiser) -> Work:
    options = config.algorithm
    rows = options.batch_size * (1 if options.prior.path is None else 2)
    number = options.gradient_accumulation
    return Work(rows, number, 1, **_given(config, rows * number))


def _pairs(config: Any, denoiser: Denoiser) -> Work:
    options = config.algorithm
    rows, number = 2 * options.batch_size, options.gradient_accumulation
    reference = options.pair_loss.needs_reference
    given = _given(config, rows * number)
    return Work(rows, number, 1, frozen_after=int(reference), reference=reference, **given)


def _kto(config: Any, denoiser: Denoiser) -> Work:
    options = config.algorithm
    rows, number = options.batch_size, options.gradient_accumulation
    point = 2 * rows * number if number > 1 else 0
    given = _given(config, rows * number)
    return Work(rows, number, 1, frozen_before=1, other_rows=point, reference=True, **given)


def _lists(config: Any, denoiser: Denoiser) -> Work:
    """Lists of a file are taken to have as many pictures as sampled ones would."""
    options, length = config.algorithm, config.data.pictures_per_prompt
    rows, number = options.batch_size * length, options.gradient_accumulation
    work = Work(rows, number, 1, frozen_before=1, reference=True)
    if not names_prompts(config.data.path):
        return replace(work, **_given(config, rows * number))
    size = max(length, options.sample_batch_size // length * length)
    return replace(work, sampling=Sampling(size, 0, 0, size, config.sampler.guidance_scale))


def _spin(config: Any, denoiser: Denoiser) -> Work:
    options = config.algorithm
    rows, number = 2 * options.batch_size, options.gradient_accumulation
    pictures = options.batch_size * number
    drawn = replace(_drawn(config, pictures), rows=options.sample_batch_size, decoded=0.0, decoded_at_once=0)
    given = _given(config, pictures)
    return Work(rows, number, 1, frozen_before=1, snapshot=True, sampling=drawn, **given)


def _self_training(config: Any, denoiser: Denoiser) -> Work:
    options = config.algorithm
    rows, updates = options.batch_size, options.updates_per_iteration
    work = Work(rows, updates * options.gradient_accumulation, updates)
    if getattr(options, "source", "samples") == "data":
        return replace(work, **_given(config, int(rows * work.batches)))
    pictures = options.prompts_per_iteration * options.group_size
    return replace(work, sampling=_drawn(config, pictures), kept_elements=4.0 * pictures)


def _trajectories(config: Any, denoiser: Denoiser) -> Work:
    options, guidance = config.algorithm, config.sampler.guidance_scale
    sampler = denoiser.make_sampler(config.sampler)
    trained = options.window.size or len(trainable_steps(options, sampler))
    steps = max(1, round(options.timestep_fraction * trained))
    pictures = options.prompts_per_iteration * options.group_size
    items = pictures // options.updates_per_epoch * steps
    rows, updates = min(options.train_batch_size, items), options.updates_per_epoch * options.inner_epochs
    itemsize = 4 if options.storage_dtype == "float32" else 2
    means = 4 * len(sampler) if options.normalize_ratio else 0
    saved = options.shared_steps / len(sampler) * (1 - 1 / options.group_size)
    return Work(
        rows,
        items / rows * updates,
        updates,
        guidance,
        frozen_after=int(options.kl_weight > 0),
        reference=options.kl_weight > 0,
        kept_elements=pictures * (itemsize * (len(sampler) + 1) + means),
        kept_prompts=pictures,
        sampling=_drawn(config, pictures, 1 - saved),
    )


def _forward_process(config: Any, denoiser: Denoiser) -> Work:
    options = config.algorithm
    pictures = options.prompts_per_iteration * options.group_size
    items = pictures // options.updates_per_iteration * options.noise_levels
    rows, updates = min(options.train_batch_size, items), options.updates_per_iteration
    moves = options.name == "nft" and min(options.old_decay_rate, options.old_decay_limit) > 0
    return Work(
        rows,
        items / rows * updates,
        updates,
        config.sampler.guidance_scale,
        frozen_before=1.0 if moves else (updates - 1) / updates,
        frozen_after=int(options.kl_weight > 0),
        reference=options.kl_weight > 0,
        snapshot=True,
        kept_elements=4.0 * pictures,
        sampling=_drawn(config, pictures),
    )


def _reward_gradient(config: Any, denoiser: Denoiser) -> Work:
    options, steps = config.algorithm, config.sampler.steps
    rows = min(options.train_batch_size, options.prompts_per_iteration)
    batches = options.prompts_per_iteration / rows
    depth, mean, before, copies = 1, 1.0, float(steps - 1), 0
    if options.name == "refl":
        before = float(options.stop_range[1])
    elif options.name == "alignprop":
        fewest, depth = options.backprop_range or (1, steps)
        mean = (fewest + depth) / 2
        before = steps - mean
    else:
        depth, copies = options.backprop_steps, options.low_variance_samples
        mean, before = float(depth + copies), float(steps - depth)
        depth += copies
    return Work(
        rows,
        batches,
        1,
        config.sampler.guidance_scale,
        other_rows=rows * batches * before,
        depth=depth,
        mean_depth=mean,
        checkpointed_steps=options.checkpoint_steps,
        reference_in_graph=options.kl_weight > 0,
        decodes=1 + copies,
        reference=options.kl_weight > 0,
    )


def _compared_trajectories(config: Any, denoiser: Denoiser) -> Work:
    options, guidance = config.algorithm, config.sampler.guidance_scale
    sampler = denoiser.make_sampler(config.sampler)
    first, last = (share * len(sampler) for share in options.timestep_range)
    steps = sum(first <= index + 0.5 < last for index in sampler.stochastic_steps())
    used = options.group_size if options.pairs == "all" else 2
    items = options.prompts_per_iteration // options.updates_per_epoch * used * steps
    rows, updates = (
        min(options.train_batch_size, max(1, items)),
        options.updates_per_epoch * options.inner_epochs,
    )
    pictures = options.prompts_per_iteration * options.group_size
    reference, replayed = items * options.updates_per_epoch, items * (updates - 1)
    return Work(
        rows,
        items / rows * updates,
        updates,
        guidance,
        other_rows=reference + replayed,
        reference=True,
        kept_elements=4.0 * pictures * (len(sampler) + 1),
        kept_prompts=pictures,
        sampling=_drawn(config, pictures),
    )


def _candidates(config: Any, denoiser: Denoiser) -> Work:
    options, guidance = config.algorithm, config.sampler.guidance_scale
    sampler = denoiser.make_sampler(config.sampler)
    branched = [index for index in sampler.stochastic_steps() if index >= options.first_step]
    prompts, wide = options.prompts_per_iteration, options.group_size
    items = prompts // options.updates_per_epoch * len(branched)
    rows, updates = (
        min(options.train_batch_size, max(1, items)),
        options.updates_per_epoch * options.inner_epochs,
    )
    size = min(max(1, options.sample_batch_size // wide), prompts) * wide
    predicted = [index for index in branched if index + 1 < len(sampler)]
    plain = branched[0] + 1 if branched else 0
    calls = prompts * (plain + wide * len(predicted))
    decoded = prompts * wide * len(branched)
    return Work(
        rows,
        items / rows * updates,
        updates,
        guidance,
        frozen_after=1,
        reference=True,
        kept_elements=4.0 * prompts * len(branched) * (1 + wide),
        kept_prompts=prompts,
        sampling=Sampling(size, calls, decoded, size, guidance),
    )


def _online_pairs(config: Any, denoiser: Denoiser) -> Work:
    options = config.algorithm
    pairs = 1 if options.pairs == "best_worst" else options.group_size * (options.group_size - 1) // 2
    items = options.prompts_per_iteration // options.updates_per_epoch * pairs * options.timesteps_per_pair
    size, updates = min(options.train_batch_size, items), options.updates_per_epoch * options.inner_epochs
    pictures = options.prompts_per_iteration * options.group_size
    reference = options.pair_loss.needs_reference
    return Work(
        2 * size,
        items / size * updates,
        updates,
        frozen_after=int(reference),
        reference=reference,
        kept_elements=4.0 * pictures,
        sampling=_drawn(config, pictures),
    )


_METHODS: dict[str, Callable[[Any, Denoiser], Work]] = {
    "sft": _sft,
    "dpo": _pairs,
    "kto": _kto,
    "rankdpo": _lists,
    "spin": _spin,
    "raft": _self_training,
    "rwr": _self_training,
    **dict.fromkeys(("ddpo", "grpo", "dpok"), _trajectories),
    **dict.fromkeys(("nft", "awm"), _forward_process),
    **dict.fromkeys(("refl", "draft", "alignprop"), _reward_gradient),
    **dict.fromkeys(("d3po", "prdp"), _compared_trajectories),
    "spo": _candidates,
    "online_dpo": _online_pairs,
}
"""Algorithm name -> its work. A new method adds a line, or is estimated by none."""
