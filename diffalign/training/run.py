"""One run from configuration to result: before, training, after, `final/`, `summary.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from diffalign.algorithms.base import Algorithm, Context, KeepsTensors, Meter
from diffalign.algorithms.table import implementation
from diffalign.config import OnlineRun, Run
from diffalign.data.prompts import load_prompts
from diffalign.errors import DiffalignError, NumericsError
from diffalign.model_card import CARD
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.models.loading import load_denoiser
from diffalign.rewards import RewardMixture
from diffalign.training.energy import EnergyCounter, total_joules
from diffalign.training.evaluation import (
    Evaluation,
    evaluate,
    read_evaluation,
    write_grid,
)
from diffalign.training.faults import dump_fault
from diffalign.training.guards import Guards
from diffalign.training.keeping import Keeping
from diffalign.training.loop import Metrics, Trainer
from diffalign.training.origins import conclude_card, start_origins
from diffalign.training.precision import set_backend_flags
from diffalign.training.preview import draw_preview
from diffalign.training.processes import Processes
from diffalign.training.progress import RunProgress
from diffalign.training.resume import Beginning, Resume, find_beginning
from diffalign.training.run_folder import RunFolder, write_atomically
from diffalign.training.signals import Interrupted, Signals
from diffalign.training.summary import device_name, summarise
from diffalign.training.tracking import TrackedRun, Trackers, require_trackers

SECONDS_FOR_TRACKERS = 3.0
"""For their last figures, when a run stops early."""


def align(
    config: Run, output_dir: Path, *, resume: Resume = "auto", allow_changes: bool = False
) -> dict[str, Any]:
    """Run `config` into `output_dir` and return what summary.json says.

    Args:
        resume: auto goes on where the folder holds a run, must insists on one, never refuses it; the path of one of
            its checkpoints goes back to that.
        allow_changes: resume with a configuration that makes it another run.

    Raises:
        DiffalignError: bad input, numerics, storage; the newest checkpoint stays loadable.
        Interrupted: SIGTERM, SIGINT or SIGUSR1 came; a checkpoint was written. It is a SystemExit with 143 or 130.
    """
    return _Run(config, output_dir, resume, allow_changes).execute()


class _Run:
    def __init__(self, config: Run, output_dir: Path, resume: Resume, allow_changes: bool) -> None:
        self.config, self.resume, self.allow_changes = config, resume, allow_changes
        training = config.training
        self.signals = Signals()
        self.processes = Processes(training.device, training.timeout, self.signals)
        set_backend_flags(training)
        self.folder = RunFolder(output_dir)
        self.progress = RunProgress(enabled=self.processes.is_main)
        self.meter = Meter(self.processes.device, self._on_phase)
        self.energy = EnergyCounter(self.processes.device)
        self.keeping = Keeping(self.folder, training, self.processes, _best_by(config), self.progress.say)
        self.guards = Guards(config.guards, _watched(config))
        self.context = Context(
            config.seed,
            self.processes.rank,
            self.processes.world,
            self.processes.device,
            self.processes.gather,
            self.meter,
            self.progress.say,
            self.processes.poll,
        )
        self.trackers = Trackers([], TrackedRun(config, output_dir, ""), self.progress.warn)
        self.begins = Beginning()
        self.trainer: Trainer | None = None
        self.origins: Thread | None = None

    def execute(self) -> dict[str, Any]:
        with self.signals:
            try:
                return self._execute()
            except Interrupted as stop:
                raise self.keeping.leave(stop, self.trainer) from None
            except Exception as error:
                ending = self.processes.settle(error)
                if ending is error:
                    raise
                raise ending from error
            finally:
                self.trackers.close(SECONDS_FOR_TRACKERS)
                self.processes.close()

    def _execute(self) -> dict[str, Any]:
        config, processes = self.config, self.processes
        # Everything that can be wrong with the input is found before the folder exists.
        require_trackers(config.tracking.trackers)
        self.begins = find_beginning(
            self.folder, config, self.resume, processes, self.progress.say, allow_changes=self.allow_changes
        )
        if self.begins.finished:
            self.progress.say(f"{self.folder.path} is finished: there is nothing to resume")
            if processes.is_main and not (self.folder.final / CARD).is_file():
                conclude_card(self.folder, self.progress.warn)
            return dict(json.loads(self.folder.summary.read_text(encoding="utf-8")))
        normalized = isinstance(config, OnlineRun) and config.reward_mode == "normalized_sum"
        reward = (
            RewardMixture(config.rewards, processes.device, normalized=normalized) if config.rewards else None
        )
        method = implementation(config)
        data = method.open_data(config, reward)
        denoiser = load_denoiser(
            config.model,
            device=processes.device,
            mixed_precision=config.training.mixed_precision,
            channels_last=config.training.channels_last,
            trainable=True,
            seed=config.seed,
        )
        for path in config.evaluation.sets.values():
            load_prompts(path, config.evaluation.prompts_per_set)
        if config.evaluation.sets:
            denoiser.make_sampler(config.evaluation.sampler)
        with self.progress:
            self.progress.begin("preparing", 1)
            self.folder.require_space(_space_needed(config, denoiser))
            algorithm = method.build(config, data, denoiser, reward, self.context)
            self.folder.require_space(_space_needed(config, denoiser, algorithm))
            processes.wait()  # until all have found nothing wrong
            if processes.is_main:
                self.folder.create(config)
                pipeline = type(denoiser.pipeline).__name__
                self.origins = start_origins(self.folder, config, pipeline, reward, self.progress.warn)
            self.progress.write_to(self.folder.path, config.algorithm.name, self.meter)
            processes.wait()
            if algorithm.uses_reference or config.training.preview_every:
                denoiser.keep_reference()
            denoiser.prepare_training(
                gradient_checkpointing=config.training.gradient_checkpointing, compile=config.training.compile
            )
            trainer = Trainer(
                algorithm,
                denoiser.trainable_parameters(),
                config.training,
                processes,
                self.meter,
                self._on_fault,
            )
            self._say_what_trains(denoiser)
            before = self._evaluate(denoiser, reward, "before")
            self.keeping.restore(trainer, self.begins)
            self.trainer = trainer
            ended = self._train(trainer, denoiser, reward)
            with trainer.averaged_weights():
                after = self._evaluate(denoiser, reward, "after")
                if processes.is_main:
                    self.folder.write_final(denoiser.export)
            return self._conclude(before, after, reward, ended)

    def _on_phase(self, name: str) -> None:
        self.progress.phase(name)
        iteration = f"iteration {self.trainer.iteration + 1}, " if self.trainer is not None else ""
        self.processes.doing(iteration + name)

    def _on_fault(self, error: NumericsError, iteration: int, batches: Sequence[Any]) -> None:
        file = dump_fault(self.folder.faults, error, iteration, self.processes.rank, batches)
        print(f"{error.what}: the samples are in {file}", file=sys.stderr)

    def _say_what_trains(self, denoiser: DiffusersDenoiser) -> None:
        count = sum(p.numel() for p in denoiser.trainable_parameters().values())
        how = self.config.model.trained
        how += " of network and text encoder" if self.config.model.train_text_encoder else " of the network"
        precision = self.config.training.mixed_precision
        self.progress.say(
            f"{self.config.algorithm.name}: {count:,} trainable parameters ({how}), "
            f"{'float32' if precision == 'no' else precision} on {device_name(self.processes.device)}"
        )
        if (
            isinstance(self.config, OnlineRun)
            and self.config.guards.on_alarm != "off"
            and not _watched(self.config)
        ):
            self.progress.say(
                "no reward is watched: give one that you do not train on weight 0, or a fooled reward goes unseen"
            )

    # Stages

    def _train(
        self, trainer: Trainer, denoiser: DiffusersDenoiser, reward: RewardMixture | None
    ) -> dict[str, Any]:
        """Train to the end, or until a guard ends it; returns how it ended, for the summary."""
        config = self.config.training
        self.progress.begin("training", config.iterations, trainer.iteration)
        if self.processes.is_main:
            tracked = TrackedRun(
                self.config, self.folder.path, self.progress.status.run_id, trainer.iteration
            )
            self.trackers = Trackers(self.config.tracking.trackers, tracked, self.progress.warn)
        if self.begins.checkpoint is None:
            if config.preview_every:
                self._preview(denoiser, reward, 0)
            first = trainer.algorithm.validate(0)
            if first and self.processes.is_main:
                self.folder.append_metrics({"iteration": 0, **first}, config.storage_patience)
        elif self.begins.preview_due:
            with trainer.averaged_weights():
                self._preview(denoiser, reward, trainer.iteration)

        stops = ""

        def on_iteration(iteration: int, metrics: Metrics) -> None:
            nonlocal stops
            if self.processes.is_main:
                self.progress.advance(iteration, metrics)
                spent = {"seconds": round(self.meter.elapsed, 3), "samples": self.meter.samples}
                record = {"iteration": iteration, **spent, **metrics}
                self.folder.append_metrics(record, config.storage_patience)
                for alarm in self.guards.see(record):
                    self.progress.say(alarm.render())
                self.trackers.log(iteration, metrics)
            stops = self._ending(trainer)
            due = stops or iteration % config.checkpoint_every == 0 or iteration == config.iterations
            if due and self.processes.is_main:
                with self.meter.phase("checkpoint"):
                    self.keeping.checkpoint(trainer, metrics)
            self.processes.poll()
            if config.preview_every and iteration % config.preview_every == 0:
                with trainer.averaged_weights():
                    self._preview(denoiser, reward, iteration)

        if self.processes.is_main:
            for line in self.folder.read_metrics():
                self.guards.see(line)
        stops = self._ending(trainer)  # a run that was ended may have been killed since
        trainer.run(on_iteration)
        self.keeping.finish()
        self.trackers.close()
        ended: dict[str, Any] = {
            "iterations": trainer.iteration,
            "alarms": [
                {"iteration": iteration, "name": alarm.name, "what": alarm.what}
                for iteration, alarm in self.guards.raised
            ],
        }
        if stops:
            best = self.keeping.return_to_best(trainer)
            self.progress.say(
                f"ended after iteration {trainer.iteration}, final/ is that of iteration {best}: {stops}"
            )
            ended["ended_early"] = {"why": stops, "weights_of_iteration": best}
        return ended

    def _ending(self, trainer: Trainer) -> str:
        """Why the training ends here, the same on all processes, or nothing."""
        stops = ""
        if self.processes.is_main and self.config.guards.on_alarm == "stop":
            stops = "; ".join(alarm.what for alarm in self.guards.standing())
        stops = self.processes.meet(stops)[0]
        if stops:
            trainer.end()
        return stops

    def _preview(self, denoiser: DiffusersDenoiser, reward: RewardMixture | None, iteration: int) -> None:
        """A grid in samples/, drawn by the first process. One that fails is warned of: training does not need it."""
        if reward is None or not self.config.evaluation.sets or not self.processes.is_main:
            return
        folder = self.folder.samples / f"iteration-{iteration}"
        try:
            grid = draw_preview(denoiser, self.config.evaluation, reward, self.context, folder)
            self.trackers.log_picture("preview", grid, iteration)
        except Exception as error:
            self.meter.count("failed_previews", 1)
            why = error.what if isinstance(error, DiffalignError) else f"{type(error).__name__}: {error}"
            self.progress.warn("preview", f"no preview of iteration {iteration}: {why}")

    def _evaluate(self, denoiser: DiffusersDenoiser, reward: RewardMixture | None, name: str) -> Evaluation:
        config = self.config.evaluation
        stored = self.folder.samples / f"{name}.json"
        if not config.sets or reward is None:
            return {}
        if self.begins.evaluated and name == "before":
            return read_evaluation(stored)
        pictures = len(config.sets) * config.prompts_per_set * config.seeds_per_prompt
        self.progress.begin(f"evaluation {name}", -(-pictures // self.processes.world))
        result = evaluate(
            denoiser,
            config,
            reward,
            self.context,
            name=name,
            folder=self.folder.samples,
            on_pictures=self.progress.advance,
        )
        self.processes.wait()
        return result

    def _conclude(
        self, before: Evaluation, after: Evaluation, reward: RewardMixture | None, ended: dict[str, Any]
    ) -> dict[str, Any]:
        joules, no_joules = total_joules(self.energy, self.processes), self.energy.reason
        if self.begins.checkpoint is not None:
            joules, no_joules = None, "the run was resumed, and what it drew before is not known"
        summary = summarise(
            self.config,
            self.meter,
            before,
            after,
            device=self.processes.device,
            processes=self.processes.world,
            joules=joules,
            no_joules=no_joules,
            ended=ended,
        )
        if self.processes.is_main:
            if before and reward is not None:
                seeds = self.config.evaluation.seeds_per_prompt
                write_grid(before, after, reward.labels[0], self.folder.samples, seeds)
            write_atomically(self.folder.summary, json.dumps(summary, indent=1))
            conclude_card(self.folder, self.progress.warn, self.origins)
            self.progress.say(
                f"finished: {self.folder.path} (final/ holds the result, summary.json the figures)"
            )
        return summary


def _space_needed(config: Run, denoiser: DiffusersDenoiser, algorithm: Algorithm | None = None) -> int:
    """Bytes: per checkpoint the weights, two moments, the average and what the algorithm keeps (an old policy, say);
    `final/` once; a little for the rest."""
    trainable = 4 * sum(p.numel() for p in denoiser.trainable_parameters().values())
    per_checkpoint = trainable * (4 if config.training.ema_decay is not None else 3)
    if isinstance(algorithm, KeepsTensors):
        per_checkpoint += sum(tensor.nbytes for tensor in algorithm.tensors().values())
    final = trainable
    if config.model.lora is None:
        final = 4 * sum(p.numel() for network in denoiser.networks().values() for p in network.parameters())
    return per_checkpoint * (config.training.keep_last + 1) + final + 50_000_000


def _watched(config: Run) -> list[str]:
    """Labels of the rewards that training does not see."""
    return [reward.label or reward.name for reward in config.rewards if not reward.weight]


def _best_by(config: Run) -> str | None:
    """The column by which the best checkpoint is kept: a watched reward, where guards may end the run."""
    if (
        config.training.keep_best is None
        and config.guards.on_alarm == "stop"
        and isinstance(config, OnlineRun)
    ):
        return f"reward/{_watched(config)[0]}" if _watched(config) else "reward/mean"
    return config.training.keep_best
