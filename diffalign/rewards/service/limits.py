"""What one request, and all waiting ones together, may take from the service."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Waiting requests hold at most `queue` times `body_bytes` of memory."""

    body_bytes: int = 32 * 2**20
    """Of one request. 413 beyond it, before the rest is read."""
    pixels: int = 2**24
    """Of one picture, from its header, before any of it is decoded."""
    batch: int = 32
    """Pictures of one request. 413 beyond it."""
    queue: int = 128
    """Requests being read, waiting or scored. 429 beyond it."""
    gather_s: float = 0.005
    """How long a reward waits for other clients' pictures before it scores what it has."""
    body_s: float = 60.0
    """Time to send a body. 408 beyond it."""
