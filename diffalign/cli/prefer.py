"""Ask people which of two pictures is better, on a local page; what they say is what `name: dpo` trains on.

Pairs are drawn from a checkpoint, two pictures of one prompt, and shown side by side. Keys: left and right arrow,
0 for a tie, s to skip, u to undo. Every answer is written at once to OUTPUT_DIR/pairs.jsonl; the same command again
goes on where it stopped. Ctrl-C or SIGTERM ends it.

Any --host but 127.0.0.1 needs a token, from the environment or a file: the browser asks for it as a password, with
any user name. To judge from another machine an SSH tunnel is simpler: ssh -L 8200:127.0.0.1:8200 MACHINE.

examples:
  diffalign prefer bundled:tiny-sd --prompts bundled:prompts/shapes_eval.txt --output-dir judged
  diffalign prefer runs/mine --prompts prompts.txt --output-dir judged --pairs 500 --port 9000
  diffalign train tiny/dpo --data.path judged/pairs.jsonl
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from diffalign.cli.sampling_args import SamplingArgs, optional, picture_size, run_behind
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from diffalign.config import SamplerConfig
    from diffalign.preference_page.collecting import Collecting
    from diffalign.preference_page.preference_set import PreferenceSet

_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Args:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """A run folder or its final/, a diffusers folder, a hub id, a .safetensors file, or bundled:tiny-sd."""
    prompts: str
    """A prompt file (.txt one a line, .jsonl, .csv, .tsv, .parquet, or bundled:...), prompts:SET, or the prompt
    itself."""
    output_dir: Path
    """The set of judgements: a new folder, or one to go on with."""
    pairs: int = 100
    """Pairs to ask about, those of earlier starts included."""
    seed: int = 0
    """Pair n is a function of the seed and n."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of this machine."""
    port: int = 8200
    """0 takes a free one, which is printed."""
    token_env: str = "DIFFALIGN_SERVICE_TOKEN"
    """Environment variable that holds the token; where it is not set, there is none."""
    token_file: Annotated[Path | None, optional("FILE")] = None
    """File that holds the token, instead."""
    steps: Annotated[int | None, optional("INT")] = None
    """Denoising steps per picture. Default: as the checkpoint's run was evaluated, else 50."""
    eta: Annotated[float | None, optional("FLOAT")] = None
    """DDIM noise scale: 0 is deterministic, 1 as noisy as DDPM. Default: as the run's, else 0."""
    guidance_scale: Annotated[float | None, optional("FLOAT")] = None
    """Classifier-free guidance weight; 1 turns guidance off. Default: as the run's, else 7.5."""
    resolution: Annotated[str | None, optional("INT|HEIGHTxWIDTH")] = None
    """Picture side in pixels, or height and width, as 512x768. Default: what the checkpoint was trained for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Compute type of the denoiser."""


def run(args: Args) -> None:
    """Serves the page until it is told to stop.

    Raises:
        ConfigError: options out of range, no token where one is needed, or a folder of other pairs.
        NumericsError: a picture that is not finite.
    """
    if args.pairs < 1:
        raise ConfigError(f"--pairs must be at least 1; got {args.pairs}")
    sampler = _sampler(args)

    from diffalign.cli.sample import read_prompts
    from diffalign.models.loading import load_for_inference
    from diffalign.preference_page.collecting import Collecting
    from diffalign.preference_page.pairs import PairPlan, draw_pair
    from diffalign.preference_page.preference_set import PreferenceSet
    from diffalign.rewards.service import access
    from diffalign.rewards.service.listening import listen

    token = access.read_token(args.token_env, args.token_file)
    access.require_token_beyond_loopback(args.host, token, args.token_env)
    prompts = read_prompts(args.prompts, None)
    plan = PairPlan(prompts, args.seed)
    kept = PreferenceSet(args.output_dir, _settings(args, prompts, sampler))
    with listen(args.host, args.port) as listener:
        denoiser = load_for_inference(
            args.checkpoint,
            device=args.device,
            mixed_precision=args.mixed_precision,
            resolution=picture_size(args.resolution),
        )
        try:
            kept.begin(args.checkpoint, denoiser.fingerprint())
            collecting = Collecting(
                kept,
                plan.pair,
                lambda pair, poll: draw_pair(denoiser, sampler, pair, poll),
                args.pairs,
            )
            _serve(args, listener, collecting, token)
        finally:
            kept.end()
    _conclude(kept, collecting)


def _sampler(args: Args) -> SamplerConfig:
    options = SamplingArgs(
        seed=args.seed,
        steps=args.steps,
        eta=args.eta,
        guidance_scale=args.guidance_scale,
        resolution=args.resolution,
    )
    return options.sampler(run_behind([args.checkpoint]), args.checkpoint)


def _settings(args: Args, prompts: Sequence[str], sampler: SamplerConfig) -> dict[str, object]:
    """What the pairs are made from, but for the checkpoint."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {
        "prompts": f"{len(prompts)}, sha256 {digest[:16]}",
        "seed": args.seed,
        "sampler": sampler.model_dump(mode="json"),
        "mixed_precision": args.mixed_precision,
    }


def _serve(args: Args, listener: socket.socket, collecting: Collecting, token: str | None) -> None:
    """Serves the page; returns once told to stop, when every answer is on the disk."""
    from diffalign.preference_page.server import PageServer

    with PageServer(listener, collecting, host=args.host, access=token) as server, _signals() as stop:
        collecting.start()
        Thread(target=server.serve_forever, name="page", daemon=True).start()
        host = f"[{args.host}]" if ":" in args.host else args.host
        guard = "token required" if token else "no token, this machine only"
        print(f"asking at http://{host}:{listener.getsockname()[1]} ({guard}); Ctrl-C ends it", flush=True)
        try:
            while not stop and collecting.failure is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        finally:
            server.shutdown()
            collecting.stop()
    if collecting.failure is not None:
        raise collecting.failure


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came: not empty once this process is told to stop."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _conclude(kept: PreferenceSet, collecting: Collecting) -> None:
    """Says what there is now."""
    state = collecting.state()
    counts = state["counts"]
    print(
        f"{state['asked']} of {state['total']} pairs: left {counts['left']}, right {counts['right']}, "
        f"ties {counts['tie']}, skipped {counts['skip']}"
    )
    if counts["left"] + counts["right"]:
        print(f"train on them: diffalign train tiny/dpo --data.path {kept.pairs}")
