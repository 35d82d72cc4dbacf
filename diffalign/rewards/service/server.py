"""Runs the application until SIGTERM or Ctrl-C; requests under way are answered first."""

from __future__ import annotations

import signal
import socket

import uvicorn
from fastapi import FastAPI

from diffalign.errors import ConfigError

_BACKLOG = 1024
_LAST_PORT = 65535
_GRACE_SECONDS = 30
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: no such port, no such address on this machine, or the port is taken.
    """
    if not 0 <= port <= _LAST_PORT:
        raise ConfigError(f"--port must be between 0 and {_LAST_PORT}; got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}", why=str(error), hint="choose another --port or --host"
        ) from error


def make_server(app: FastAPI) -> uvicorn.Server:
    """uvicorn with our settings: no access log, and a stop that waits for requests under way."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Blocks until it is told to stop, and then returns. For the main thread only."""
    server = make_server(app)

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn handles these signals itself, and raises them again once it has stopped.
    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
