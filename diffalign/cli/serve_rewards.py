"""Serve rewards to other processes and machines, over HTTP. The reward `http` is the client.

Any --host but 127.0.0.1 needs a token, from the environment or a file. Ctrl-C or SIGTERM stops the service once
the requests under way are answered. Needs the extra: pip install 'diffalign[serve]'.

examples:
  diffalign serve-rewards --rewards aesthetic,clip
  diffalign serve-rewards --rewards clip --options clip.checkpoint=bundled:clip --port 8200
  diffalign serve-rewards --rewards aesthetic --host 0.0.0.0 --token-file token.txt --device cuda:1
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from diffalign.cli.sampling_args import optional

if TYPE_CHECKING:
    from diffalign.rewards.service.limits import Limits


@dataclass(frozen=True)
class Args:
    rewards: str
    """Reward names, separated by commas; also file.py:function and package.module:function."""
    options: Annotated[tuple[str, ...], optional("[NAME.OPTION=VALUE ...]")] = ()
    """Options of the rewards, e.g. clip.checkpoint=bundled:clip."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of this machine."""
    port: int = 8100
    """0 takes a free one, which is printed."""
    token_env: str = "DIFFALIGN_SERVICE_TOKEN"
    """Environment variable that holds the token; where it is not set, there is none."""
    token_file: Annotated[Path | None, optional("FILE")] = None
    """File that holds the token, instead."""
    device: str = "auto"
    """Where the rewards run: cpu, cuda, cuda:1, ...; auto: the GPU if there is one."""
    max_body_mb: int = 32
    """Largest request, in MiB."""
    max_pixels: int = 2**24
    """Largest picture, width times height."""
    max_batch: int = 32
    """Most pictures in one request."""
    max_queue: int = 128
    """Most requests under way; the next one is told to come back (429)."""
    gather_ms: int = 5
    """How long a reward waits for other clients' pictures before it scores a batch, in milliseconds."""


def run(args: Args) -> None:
    """Loads the rewards, says where they are served, and returns when it is told to stop."""
    from diffalign.errors import ConfigError

    try:
        from diffalign.rewards.service import access, app, server
    except ImportError as error:
        raise ConfigError(
            "the reward service needs FastAPI and uvicorn",
            why=str(error),
            hint="pip install 'diffalign[serve]'",
        ) from error
    from diffalign.cli.score import reward_names, reward_options
    from diffalign.rewards import load_reward

    limits = _limits(args)
    token = access.read_token(args.token_env, args.token_file)
    access.require_token_beyond_loopback(args.host, token, args.token_env)
    with server.listen(args.host, args.port) as listener:
        names = reward_names(args.rewards)
        options = reward_options(args.options, names)
        device = _device(args.device)
        rewards = {name: load_reward(name, device=device, **options[name]) for name in names}
        host = f"[{args.host}]" if ":" in args.host else args.host
        guard = "token required" if token else "no token, this machine only"
        print(
            f"serving {', '.join(names)} at http://{host}:{listener.getsockname()[1]} ({guard})", flush=True
        )
        server.serve(app.build_app(rewards, limits=limits, token=token), listener)
    print("stopped")


def _limits(args: Args) -> Limits:
    from diffalign.errors import ConfigError
    from diffalign.rewards.service.limits import Limits

    for option in ("max_body_mb", "max_pixels", "max_batch", "max_queue"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least 1")
    if args.gather_ms < 0:
        raise ConfigError("--gather-ms must not be negative")
    return Limits(
        body_bytes=args.max_body_mb * 2**20,
        pixels=args.max_pixels,
        batch=args.max_batch,
        queue=args.max_queue,
        gather_s=args.gather_ms / 1000,
    )


def _device(name: str) -> str:
    import torch

    from diffalign.errors import DeviceError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as error:  # torch raises several kinds
        raise DeviceError(
            f"--device {name} is not there", why=str(error).split("\n")[0], hint="use auto or cpu"
        ) from error
    return name
