"""Who may use the service: anyone on this machine, or whoever has the token."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from diffalign.errors import ConfigError

LOOPBACK = "127.0.0.1"
_SHORTEST = 16
_MAKE_ONE = "make one: python -c 'import secrets; print(secrets.token_hex(32))'"


def read_token(variable: str, file: Path | None) -> str | None:
    """The token from `file`, else from the environment variable, else None. Never from the command line.

    Raises:
        ConfigError: the file cannot be read, or the token is too short or no plain ASCII word.
    """
    if file is None:
        token, where = os.environ.get(variable), f"${variable}"
        if token is None:
            return None
    else:
        where = str(file)
        try:
            token = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("the token file cannot be read", where=where, why=str(error)) from error
    token = token.strip()
    if len(token) < _SHORTEST or not all("!" <= letter <= "~" for letter in token):
        raise ConfigError(
            f"the token must have at least {_SHORTEST} letters, digits or signs, and no spaces",
            where=where,
            hint=_MAKE_ONE,
        )
    return token


def require_token_beyond_loopback(host: str, token: str | None, variable: str) -> None:
    """Raises ConfigError where other machines could reach a service without a token."""
    if token is None and host != LOOPBACK:
        raise ConfigError(
            f"serving on {host} needs a token",
            why=f"only {LOOPBACK} is out of reach of other machines",
            hint=f"set ${variable} or --token-file; {_MAKE_ONE}",
        )


def is_authorised(header: str | None, token: str | None) -> bool:
    """Whether an Authorization header carries the token; compared in constant time, whatever its length."""
    if token is None:
        return True
    scheme, _, given = (header or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(_digest(given.strip()), _digest(token))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()
