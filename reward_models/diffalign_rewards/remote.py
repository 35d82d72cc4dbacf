"""What rewards behind an HTTP address share: JSON requests, bounded retries, pictures as PNG.

Nothing but the standard library: the HTTP client that huggingface_hub brings changes with its version.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import IO, Any, NoReturn

from PIL import Image

from diffalign.errors import RewardError

_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 30.0
_LOCAL = {"127.0.0.1", "localhost", "::1"}


def png_base64(picture: Image.Image) -> str:
    """The picture as a PNG (lossless), in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def secret(variable: str | None) -> str | None:
    """The value of the environment variable that an option names; None where none is named.

    Raises:
        RewardError: the variable is not set, empty, or no word of plain ASCII.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value or not all("!" <= letter <= "~" for letter in value):
        raise RewardError(
            f"the environment variable {variable} holds no token" if value else f"{variable} is not set",
            why="a token is one word of plain ASCII" if value else None,
            hint="export it before the command; secrets do not belong in run files",
        )
    return value


def beginning(text: str, length: int = 160) -> str:
    """The first characters of an answer, on one line, for an error message."""
    line = " ".join(text.split())
    return repr(line if len(line) <= length else line[:length] + "...")


class Endpoint:
    """An HTTP address that takes and gives JSON.

    Connection errors, cut answers, 429 and 5xx are tried again `retries` times, after 0.5, 1, 2, ... s (at most 30,
    shortened by up to half at random so that clients do not come back together) or what Retry-After asks for. A
    redirect is not followed, because it would carry the token elsewhere. Proxies of the environment are used for
    other machines only.

    Args:
        url: the address that paths are appended to.
        what: how error messages call it.
        token: sent as a bearer token.
        timeout_s: seconds to wait for a connection, and for each part of an answer.
    """

    def __init__(self, url: str, *, what: str, token: str | None, timeout_s: float, retries: int) -> None:
        if not timeout_s > 0 or retries < 0:
            raise RewardError(
                "timeout_s must be above 0, and retries 0 or more",
                why=f"got timeout_s {timeout_s}, retries {retries}",
            )
        host = _host(url)
        self.url, self.what, self.timeout_s, self.retries = url.rstrip("/"), what, timeout_s, retries
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if host in _LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def call(self, path: str, payload: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The JSON object that a GET, or a POST of `payload`, gives.

        Raises:
            RewardError: no answer within the retries, a refusal, or an answer that is no JSON object.
        """
        headers = dict(self._headers)
        body = None if payload is None else json.dumps(payload).encode()
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        for attempt in range(self.retries + 1):
            try:
                return self._parsed(self._once(request))
            except _Transient as trouble:
                why = f"{attempt + 1} attempts; the last: {trouble}"
                if attempt < self.retries:
                    time.sleep(max(_delay(attempt), min(trouble.wait_s, _LONGEST_DELAY_SECONDS)))
        raise RewardError(
            f"{self.what} does not answer",
            where=request.full_url,
            why=why,
            hint="is it running, and the address right? retries and timeout_s say how long to wait",
        )

    def _once(self, request: urllib.request.Request) -> str:
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                return str(response.read().decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            self._refused(error)
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from error

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        try:
            with error:
                text = error.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        answer = f"HTTP {error.code} {error.reason}: {beginning(text)}"
        if error.code == 429 or error.code >= 500:
            raise _Transient(answer, _seconds(error.headers.get("Retry-After"))) from error
        hints = {401: "token", 403: "token", 404: "address", 413: "number and size of the pictures"}
        raise RewardError(
            f"{self.what} refused the request",
            where=str(error.url),
            why=answer,
            hint=f"check the {hints.get(error.code, 'options of the reward')}",
        ) from error

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RewardError(
                f"{self.what} did not answer with a JSON object",
                where=self.url,
                why=f"the answer begins: {beginning(text)}",
                hint="is this its own address, and not a web page in front of it?",
            )
        return answer


class _Transient(Exception):
    """Trouble that may pass; `wait_s` is what the server asks for."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _host(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        host, plain = parts.hostname, all("!" <= letter <= "~" for letter in url)
        if (
            host
            and parts.port != 0
            and parts.scheme in ("http", "https")
            and plain
            and not set(url) & set("@?#")
        ):
            return host
    except ValueError:  # a port that is no number
        pass
    raise RewardError(
        f"{url} is no address of a service",
        hint="write http://HOST:PORT or https://HOST, without user name, password or query",
    )


def _delay(attempt: int) -> float:
    return min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**attempt) * random.uniform(0.5, 1.0)


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.isdigit() else 0.0
