"""SIGKILL at random moments, checkpoint writing included: the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from tiny_runs import assert_same, fork_group, make_run, outcome, train, wait

from diffalign.training.checkpoint import list_checkpoints, read_checkpoint
from diffalign.training.run import align


def survive(data, model, tmp_path, method, kills, processes, seed):
    """`kills` kills over as many runs as it takes; each run must end equal to the undisturbed one."""
    config = make_run(data, model, method, checkpoint_every=1)
    began = time.monotonic()
    assert train(config, tmp_path / "straight", processes) == [0] * processes
    took = time.monotonic() - began
    straight, draw, done, run = outcome(tmp_path / "straight"), random.Random(seed), 0, 0
    while done < kills:
        folder, codes = tmp_path / f"run-{run}", []
        run += 1
        while codes != [0] * processes:
            children = fork_group(
                processes, lambda folder=folder: align(config, folder), folder.with_suffix(".log")
            )
            if done < kills:
                time.sleep(draw.uniform(0, 1.1) * took)
                os.kill(children[draw.randrange(processes)], signal.SIGKILL)
                for child in children if processes > 1 else ():  # as every launcher does
                    os.kill(child, signal.SIGKILL)
            codes = wait(children)
            killed = 137 in codes
            assert killed or codes == [0] * processes, folder.with_suffix(".log").read_text()
            done += killed
            took *= 1.0 if killed else 0.9  # it ended before: the machine has become faster
            for path in list_checkpoints(folder / "checkpoints"):
                read_checkpoint(path)
        assert_same(folder, straight)


@pytest.mark.parametrize("method", ["sft", "dpo", "ddpo"])
def test_four_kills_change_nothing(data, tiny_pipeline_dir, tmp_path, method):
    survive(data, tiny_pipeline_dir, tmp_path, method, kills=4, processes=1, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("method", ["sft", "dpo", "ddpo"])
def test_fifty_kills_change_nothing(data, tiny_pipeline_dir, tmp_path, method):
    survive(data, tiny_pipeline_dir, tmp_path, method, kills=50, processes=1, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("method", ["sft", "dpo", "ddpo"])
def test_ten_kills_of_two_processes_change_nothing(data, tiny_pipeline_dir, tmp_path, method):
    survive(data, tiny_pipeline_dir, tmp_path, method, kills=10, processes=2, seed=3)
