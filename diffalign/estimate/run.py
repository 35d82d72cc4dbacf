"""The estimate of a run: its parts and phases, the largest of these, and the arithmetic of an iteration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from diffalign.config import Run
from diffalign.estimate.hardware import GIB
from diffalign.estimate.kernels import DeviceKind
from diffalign.estimate.methods import work_of
from diffalign.estimate.parts import Part, Phase, reward_parts, standing_parts
from diffalign.estimate.phases import PROMPTS_AT_ONCE, Phases
from diffalign.estimate.subject import subject


@dataclass(frozen=True)
class Estimate:
    """What a run needs on one device.

    Args:
        subject: model, family, size of pictures and what is trained, in words.
        kind: of device.
        standing: what lies in memory whatever the run does.
        working: what each phase needs beyond that.
        flops: of an iteration, by phase; see `Cost`. Rewards and text encoders are not in it.
        not_counted: what is not in the figures.
    """

    subject: str
    kind: DeviceKind
    standing: list[Part]
    working: list[Part]
    flops: dict[str, int]
    not_counted: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[Part]:
        return [*self.standing, *self.working]

    def total(self, phase: Phase) -> int:
        """Bytes at once in a phase."""
        return sum(part.bytes for part in self.parts if not part.phases or phase in part.phases)

    @property
    def totals(self) -> dict[Phase, int]:
        """Bytes at once in each phase that the run has."""
        happen = {phase for part in self.working for phase in part.phases}
        return {phase: self.total(phase) for phase in get_args(Phase) if phase in happen}

    @property
    def peak(self) -> int:
        """Bytes at once in the phase that needs most."""
        return max(self.totals.values())

    @property
    def peak_phase(self) -> Phase:
        return max(self.totals, key=lambda phase: self.totals[phase])

    @property
    def flops_per_iteration(self) -> int:
        return sum(self.flops.values())

    def to_json(self) -> dict[str, Any]:
        """JSON-safe; sizes in bytes."""
        return {
            "subject": self.subject,
            "device": self.kind,
            "parts": [asdict(part) for part in self.parts],
            "phases": self.totals,
            "peak_bytes": self.peak,
            "peak_phase": self.peak_phase,
            "flops_per_iteration": self.flops_per_iteration,
            "flops": self.flops,
            "not_counted": self.not_counted,
        }

    def table(self) -> Iterator[str]:
        """The lines that the terminal shows."""
        rows = [
            (part.name, part.bytes, ", ".join(part.phases) or "always") for part in self.parts if part.bytes
        ]
        previous = ""
        rows += [(f"total while {phase}", size, "peak" if phase == self.peak_phase else "")
                 for phase, size in self.totals.items()]  # fmt: skip
        width = max(len(name) for name, _, _ in rows)
        yield f"{'part':<{width}}  {'GiB':>8}  when"
        for name, size, when in rows:
            if name.startswith("total") and not previous.startswith("total"):
                yield ""
            previous = name
            yield f"{name:<{width}}  {in_gib(size):>8}  {when}".rstrip()


def in_gib(size: float) -> str:
    """`12.34`, and more digits for what is tiny."""
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.4f}"


def estimate(config: Run, kind: DeviceKind) -> Estimate:
    """Peak memory and arithmetic of a run on one device of that kind, with one process.

    No weights are read, and no data. Of a hub id, configuration files are fetched.

    Raises:
        CheckpointError: no such checkpoint, or configuration files that are missing or build nothing.
        ConfigError: options that this checkpoint cannot have.
    """
    denoiser = subject(config, kind)
    work = work_of(config, denoiser)
    if work.reference:
        denoiser.keep_reference()
    phases = Phases(denoiser, work, config)
    rewards, unknown = reward_parts(config)
    standing = [*standing_parts(phases, config, kind), *rewards]
    notes = [f"reward {name} (its size is not known without its weights)" for name in unknown]
    height, width = (int(side) for side in denoiser.size)
    notes += _left_out(config)
    precision = "float32" if config.training.mixed_precision == "no" else config.training.mixed_precision
    words = (
        f"{config.algorithm.name} of {config.model.path} ({type(denoiser).__name__}, {height} x {width} pixels, "
        f"{config.model.trained}, {precision})"
    )
    return Estimate(words, kind, standing, list(_worked(phases, config)), dict(_arithmetic(phases)), notes)


def _left_out(config: Run) -> Iterator[str]:
    """What the options ask for and the figures do not have."""
    lora = config.model.lora
    for adapter in config.model.adapters:
        if adapter.mode == "freeze":
            yield f"the frozen adapter {adapter.path}"
        elif adapter.mode == "continue" and lora is not None:
            yield f"the rank and modules of the adapter {adapter.path}: as a LoRA of rank {lora.rank} by default"
    if getattr(getattr(config, "data", None), "buckets", None) is not None:
        yield "the sizes of data.buckets: every picture as one of model.resolution"


def _worked(phases: Phases, config: Run) -> Iterator[Part]:
    """What each phase allocates beyond the standing parts."""
    work, gradients = phases.work, sum(p.numel() * 4 for p in phases.denoiser.trainable_parameters().values())
    step = phases.training
    beyond = step.peak if work.accumulates else max(0, step.peak - gradients)
    yield Part(f"forward and backward pass of {work.rows} pictures", beyond, ("training",))
    if work.sampling is not None:
        drawn = work.sampling
        cost = phases.forward(drawn.rows, drawn.guidance)
        yield Part(f"denoiser on {drawn.rows} pictures", cost.peak, ("sampling",))
        if drawn.decoded_at_once:
            cost = phases.decode(drawn.decoded_at_once)
            yield Part(f"decoding {drawn.decoded_at_once} pictures", cost.peak, ("decoding",))
    if work.encoded_at_once:
        cost = phases.encode(work.encoded_at_once)
        yield Part(f"encoding {work.encoded_at_once} pictures", cost.peak, ("encoding pictures",))
    most = max(work.rows, work.sampling.rows if work.sampling else 0)
    if config.evaluation.sets and config.rewards:
        rows, sampler = config.evaluation.batch_size, config.evaluation.sampler
        peak = max(phases.forward(rows, sampler.guidance_scale).peak, phases.decode(rows).peak)
        yield Part(f"evaluation of {rows} pictures", peak, ("evaluation",))
        most = max(most, rows)
    if not phases.denoiser.trains_text_encoder:
        count = min(most + 1, PROMPTS_AT_ONCE)
        yield Part(
            f"work: text encoders on {count} prompts", phases.prompts(count).peak, ("encoding prompts",)
        )


def _arithmetic(phases: Phases) -> Iterator[tuple[str, int]]:
    """Flops of an iteration, by phase."""
    work = phases.work
    graph = phases.training.flops * work.mean_depth / work.depth
    frozen = work.rows * work.batches * (work.frozen_before + work.frozen_after) + work.other_rows
    without = phases.forward(work.rows, work.guidance).flops / work.rows * frozen if frozen else 0
    yield "training", int(graph * work.batches + without)
    if work.sampling is not None and work.sampling.calls:
        drawn = work.sampling
        yield "sampling", int(phases.forward(drawn.rows, drawn.guidance).flops / drawn.rows * drawn.calls)
        if drawn.decoded:
            each = phases.decode(drawn.decoded_at_once).flops / drawn.decoded_at_once
            yield "decoding", int(each * drawn.decoded)
    if work.encoded:
        yield (
            "encoding pictures",
            int(phases.encode(work.encoded_at_once).flops / work.encoded_at_once * work.encoded),
        )
