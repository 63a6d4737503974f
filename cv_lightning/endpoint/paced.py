"""The HTTP client beneath the `openai` library: our pace, circuit breaker and limits, under the library's retries."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from aiolimiter import AsyncLimiter

from cv_lightning.endpoint.breaker import CircuitBreaker
from cv_lightning.endpoint.config import EndpointConfig, Spent

TOO_MANY_REQUESTS = 429


class Pacing:
    """What the requests of one event loop share: rate, breaker, and the last failure.

    Args:
        config: Limits of the endpoint.
        spent: Where requests are counted.
        max_body_bytes: A server that sends a larger answer is broken.
    """

    def __init__(self, config: EndpointConfig, spent: Spent, max_body_bytes: int) -> None:
        rate = config.requests_per_s
        self.config, self.spent, self.max_body_bytes = config, spent, max_body_bytes
        self.limiter = AsyncLimiter(max(1.0, rate), max(1.0, rate) / rate) if rate else None
        self.breaker = CircuitBreaker(config.breaker_failures, config.breaker_pause_s, config.give_up_s)
        self.trouble = ""
        """The last failure, for people."""


class PacedClient(httpx2.AsyncClient):
    """Sends each request when rate and breaker allow it, and reads its answer whole.

    HTTP 429 is not a failure: the server asks for a slower pace, and the request is sent again for as long as its
    caller waits.

    Args:
        pacing: What the requests share.
        options: Of `httpx2.AsyncClient`.
    """

    def __init__(self, pacing: Pacing, **options: Any) -> None:
        super().__init__(**options)
        self.pacing = pacing

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request; raises what httpx2 raises, and `OtherSideDownError`."""
        pacing = self.pacing
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            pacing.spent.retries += 1
        for name in [name for name in request.headers if name.startswith("x-stainless-")]:
            del request.headers[name]  # what this machine is concerns no server
        for number in itertools.count():
            if pacing.limiter is not None:
                await pacing.limiter.acquire()
            async with pacing.breaker.admitted():
                response = await self._send_once(request, options)
            asked = retry_after(response.headers.pop("retry-after", None))
            if asked is not None:
                asked = min(asked, pacing.config.max_backoff_s)
                pacing.breaker.quiet(asked)
            if response.status_code != TOO_MANY_REQUESTS:
                break
            pacing.trouble = f"HTTP {TOO_MANY_REQUESTS}"
            pacing.spent.retries += 1
            wait = min(0.5 * 2.0**number, pacing.config.max_backoff_s)
            await asyncio.sleep(wait * random.random() if asked is None else asked * random.uniform(1.0, 1.2))
        return response

    async def _send_once(self, request: httpx2.Request, options: dict[str, Any]) -> httpx2.Response:
        pacing = self.pacing
        pacing.spent.requests += 1
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(
                pacing.config.timeout_s
            ):  # of the whole answer: a slow drip resets read time-outs
                response = await super().send(request, **(options | {"stream": True}))
                body = await self._body(response)
        except (httpx2.HTTPError, TimeoutError) as error:
            pacing.breaker.failed()
            pacing.trouble = f"{type(error).__name__}: {error}"[:200]
            if isinstance(error, TimeoutError):
                raise httpx2.ReadTimeout(f"no answer in {pacing.config.timeout_s:g} s", request=request) from error
            raise
        if response.is_success:
            pacing.breaker.succeeded()
            pacing.spent.latencies_s.append(time.perf_counter() - begun)
        elif response.is_server_error:
            pacing.breaker.failed()
        headers = [(k, v) for k, v in response.headers.items() if k not in ("content-encoding", "content-length")]
        return httpx2.Response(response.status_code, headers=headers, content=body, request=request)

    async def _body(self, response: httpx2.Response) -> bytes:
        body = bytearray()
        try:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > self.pacing.max_body_bytes:
                    raise httpx2.DecodingError(
                        f"more than {self.pacing.max_body_bytes} bytes", request=response.request
                    )
        finally:
            await response.aclose()
        return bytes(body)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date; None if there is none to be read."""
    try:
        seconds = float(value or "nan")
    except ValueError:
        try:
            seconds = max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
