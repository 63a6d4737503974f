"""The HTTP client below the `openai` library: rate limit, circuit breaker and size limits."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from aiolimiter import AsyncLimiter

from cv_lightning.endpoint.config import EndpointConfig, Spent

TOO_MANY_REQUESTS = 429
POLL_S = 0.1
"""Seconds between two looks of a request that waits for an open circuit."""


class EndpointDownError(Exception):
    """The server has answered no request for `give_up_s`."""


class Pacing:
    """What the requests of one event loop share: rate limit, circuit breaker, counts and the last failure.

    After `breaker_failures` failures in a row the circuit is open: nothing is sent for `breaker_pause_s`, then one
    request probes the server. Requests that wait fail together once the server has been down for `give_up_s`, so that
    a long queue does not run into one time-out after another.
    """

    def __init__(self, config: EndpointConfig, spent: Spent, max_body_bytes: int) -> None:
        rate = config.requests_per_s
        self.config, self.spent, self.max_body_bytes = config, spent, max_body_bytes
        self.limiter = AsyncLimiter(max(1.0, rate), max(1.0, rate) / rate) if rate else None
        self.trouble = ""
        """The last failure, for error messages."""
        self._failures = 0
        self._open_until: float | None = None
        """When the next probe may be sent; None while the circuit is closed."""
        self._down_since = math.inf
        self._quiet_until = -math.inf
        self._probing = False

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait until a request may be sent; call `succeeded` or `failed` inside. Raises EndpointDownError."""
        if self.limiter is not None:
            await self.limiter.acquire()
        probes = await self._is_probe()
        try:
            yield
        finally:
            if probes:
                self._probing = False

    async def _is_probe(self) -> bool:
        """Wait for admission; True for the one request that probes the server while the circuit is open."""
        loop = asyncio.get_running_loop()
        while (quiet := self._quiet_until - loop.time()) > 0:
            await asyncio.sleep(quiet)
        while self._open_until is not None:
            left, down = self._open_until - loop.time(), loop.time() - self._down_since
            if left <= 0 and not self._probing:
                self._probing = True
                return True
            if down > self.config.give_up_s:
                raise EndpointDownError(f"nothing answered for {down:.0f} s")
            await asyncio.sleep(min(max(left, 0.01), POLL_S))
        return False

    def succeeded(self) -> None:
        """Close the circuit."""
        self._failures, self._open_until, self._down_since = 0, None, math.inf

    def failed(self) -> None:
        """Count a failure; the circuit opens after too many in a row."""
        self._failures += 1
        if self._failures >= self.config.breaker_failures:
            now = asyncio.get_running_loop().time()
            self._open_until, self._down_since = now + self.config.breaker_pause_s, min(self._down_since, now)

    def pause(self, seconds: float) -> None:
        """Send nothing for some seconds, as the server has asked."""
        self._quiet_until = max(self._quiet_until, asyncio.get_running_loop().time() + seconds)


class PacedClient(httpx2.AsyncClient):
    """Sends each request when rate limit and breaker allow it, and reads its answer whole.

    HTTP 429 is not a failure: the server asks for a slower pace, and the request is repeated for as long as its caller
    waits.
    """

    def __init__(self, pacing: Pacing, **options: Any) -> None:
        super().__init__(**options)
        self.pacing = pacing

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request; raises what httpx2 raises, and `EndpointDownError`."""
        pacing, longest = self.pacing, self.pacing.config.max_backoff_s
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            pacing.spent.retries += 1
        for name in [name for name in request.headers if name.startswith("x-stainless-")]:
            del request.headers[name]  # facts about this machine, which no server needs
        for number in itertools.count():
            async with pacing.admitted():
                response = await self._send_once(request, options)
            asked = retry_after(response.headers.pop("retry-after", None))
            if asked is not None:
                asked = min(asked, longest)
                pacing.pause(asked)
            if response.status_code != TOO_MANY_REQUESTS:
                break
            pacing.trouble = f"HTTP {TOO_MANY_REQUESTS}"
            pacing.spent.retries += 1
            backoff = min(0.5 * 2.0**number, longest) * random.random()
            await asyncio.sleep(backoff if asked is None else asked * random.uniform(1.0, 1.2))
        return response

    async def _send_once(self, request: httpx2.Request, options: dict[str, Any]) -> httpx2.Response:
        pacing = self.pacing
        pacing.spent.requests += 1
        begun = time.perf_counter()
        try:
            # The time-out is one of the whole answer: httpx's own restarts with every byte.
            async with asyncio.timeout(pacing.config.timeout_s):
                response = await super().send(request, **(options | {"stream": True}))
                body = await self._body(response)
        except (httpx2.HTTPError, TimeoutError) as error:
            pacing.failed()
            pacing.trouble = f"{type(error).__name__}: {error}"[:200]
            if isinstance(error, TimeoutError):
                raise httpx2.ReadTimeout(f"no answer in {pacing.config.timeout_s:g} s", request=request) from error
            raise
        if response.is_success:
            pacing.succeeded()
            pacing.spent.latencies_s.append(time.perf_counter() - begun)
        elif response.is_server_error:
            pacing.failed()
        headers = [(k, v) for k, v in response.headers.items() if k not in ("content-encoding", "content-length")]
        return httpx2.Response(response.status_code, headers=headers, content=body, request=request)

    async def _body(self, response: httpx2.Response) -> bytes:
        body, limit = bytearray(), self.pacing.max_body_bytes
        try:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > limit:
                    raise httpx2.DecodingError(f"more than {limit} bytes", request=response.request)
        finally:
            await response.aclose()
        return bytes(body)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None without one that can be read."""
    try:
        seconds = float(value or "nan")
    except ValueError:
        try:
            seconds = max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
