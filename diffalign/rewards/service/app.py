"""The routes: GET /health, GET /rewards, POST /score."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from diffalign.rewards.model import RewardModel
from diffalign.rewards.service.access import LOOPBACK, is_authorised
from diffalign.rewards.service.limits import Limits
from diffalign.rewards.service.worker import Result, Worker

_RETRY_AFTER_SECONDS = 1


class ScoreRequest(BaseModel):
    """Pictures (base64 of PNG) and prompts, which are pairs, for one reward."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reward: str
    images: Annotated[list[str], Field(min_length=1)]
    prompts: list[str]


def build_app(
    rewards: Mapping[str, RewardModel], *, limits: Limits | None = None, token: str | None = None
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        rewards: by the name that clients ask for. One thread each, which starts and ends with the application.
        token: what /rewards and /score ask for. Without one only requests addressed to this machine's own name are
            answered, so that no web page can reach the service through its visitor's browser.
    """
    service = _Service(rewards, limits or Limits(), token)
    app = FastAPI(lifespan=service.lifespan, openapi_url=None)
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])
    guard = [Depends(service.authorise)]
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/rewards", service.describe, methods=["GET"], dependencies=guard)
    app.add_api_route("/score", service.score, methods=["POST"], dependencies=guard)
    return app


class _Service:
    def __init__(self, rewards: Mapping[str, RewardModel], limits: Limits, token: str | None) -> None:
        self.limits, self.token = limits, token
        self.workers = {name: Worker(name, reward, limits) for name, reward in rewards.items()}
        self.admitted = 0

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        for worker in self.workers.values():
            worker.start()
        yield
        for worker in self.workers.values():
            await run_in_threadpool(worker.stop)

    async def authorise(self, request: Request) -> None:
        if not is_authorised(request.headers.get("authorization"), self.token):
            raise HTTPException(401, "no token, or a wrong one", {"WWW-Authenticate": "Bearer"})

    async def health(self) -> JSONResponse:
        dead = [name for name, worker in self.workers.items() if not worker.alive]
        return JSONResponse({"status": "down" if dead else "ok"}, 503 if dead else 200)

    async def describe(self) -> JSONResponse:
        limits = {name: getattr(self.limits, name) for name in ("batch", "body_bytes", "pixels")}
        described = {name: _attributes(worker.reward) for name, worker in self.workers.items()}
        return JSONResponse({"rewards": described, "limits": limits})

    async def score(self, request: Request) -> JSONResponse:
        with self._admission():
            call = await run_in_threadpool(_parse, await self._body(request))
            worker = self.workers.get(call.reward)
            if worker is None:
                raise HTTPException(422, f"no reward {call.reward!r}; there are {', '.join(self.workers)}")
            if len(call.images) != len(call.prompts):
                raise HTTPException(422, f"{len(call.images)} images but {len(call.prompts)} prompts")
            if len(call.images) > self.limits.batch:
                raise HTTPException(413, f"{len(call.images)} images; at most {self.limits.batch} a request")
            results = await asyncio.wrap_future(worker.submit(call.images, call.prompts))
        return JSONResponse({"reward": call.reward, "results": [_item(result) for result in results]})

    @contextmanager
    def _admission(self) -> Iterator[None]:
        """One of the queue's places, taken before the body is read."""
        if self.admitted >= self.limits.queue:
            raise HTTPException(
                429, f"{self.admitted} requests are waiting", {"Retry-After": str(_RETRY_AFTER_SECONDS)}
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a web page cannot send this type to another site unasked
            raise HTTPException(415, "send application/json")
        limit = self.limits.body_bytes
        too_large = HTTPException(413, f"the body is too large; at most {limit} bytes")
        if int(request.headers.get("content-length", "0")) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limit:
                        raise too_large
                    body += chunk
        except TimeoutError:
            raise HTTPException(408, f"the body took more than {self.limits.body_s:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client left") from None
        return bytes(body)


def _parse(body: bytes) -> ScoreRequest:
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise HTTPException(422, f"{where}: {first['msg']}" if where else first["msg"]) from None


def _attributes(reward: RewardModel) -> dict[str, object]:
    """The contract's attributes; null is no bound, because JSON knows no infinity."""
    return {
        "range": [bound if math.isfinite(bound) else None for bound in reward.range],
        "higher_is_better": reward.higher_is_better,
        "differentiable": reward.differentiable,
        "needs_prompt": reward.needs_prompt,
        "license": reward.license,
    }


def _item(result: Result) -> dict[str, object]:
    if isinstance(result, float):
        return {"score": result}
    return {"error": {"kind": result.kind, "message": result.message}}
