"""The client of a served model: one answer per request, however the server behaves.

Runs on one event loop at a time and never blocks it. Requests are limited in number and rate, retried, and paused
while the server is down.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
import tenacity
from aiolimiter import AsyncLimiter

from cv_lightning.endpoint.breaker import CircuitBreaker, OtherSideDownError
from cv_lightning.endpoint.config import EndpointConfig
from cv_lightning.types import EndpointError

LOG = logging.getLogger(__name__)

T = TypeVar("T")

POOL_SIZE = 4
"""Connections of one client: httpx looks at every idle one of a pool for each request, which takes more time at 64 than
the request itself."""
MAX_BODY_BYTES = 1 << 24
"""Largest answer that is read."""
RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524, 529})


class TransientFailureError(Exception):
    """A try failed in a way that another may not."""

    def __init__(self, message: str, retry_after_s: float | None = None, *, is_pacing: bool = False) -> None:
        """Keep what the server asked for.

        Args:
            message: what happened.
            retry_after_s: how long the server wants to be left alone.
            is_pacing: the server is well and only asks for fewer requests; such a try is not counted.
        """
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.is_pacing = is_pacing


class _EnoughFailures:
    """Stop condition: so many tries failed; those that the server put off are none."""

    def __init__(self, limit: int) -> None:
        self.limit, self.failed = limit, 0

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        self.failed += not (isinstance(error, TransientFailureError) and error.is_pacing)
        return self.failed >= self.limit


@dataclass(slots=True)
class Spent:
    """What an endpoint was asked for so far."""

    requests: int = 0
    retries: int = 0
    failed: int = 0
    """Answers that were given up."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    """Of successful requests, the last ones."""


@dataclass(slots=True)
class _Connection:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    clients: list[httpx.AsyncClient]
    slots: asyncio.LifoQueue[httpx.AsyncClient]
    """One entry for each request that may be under way: the client that sends it."""
    limiter: AsyncLimiter | None
    breaker: CircuitBreaker
    trouble: str = ""
    """The last failure, for people."""

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[httpx.AsyncClient]:
        """Wait for a turn; waiters are served in order."""
        client = await self.slots.get()
        try:
            yield client
        finally:
            self.slots.put_nowait(client)

    async def paced(self) -> None:
        """Wait for the next request that the rate limit allows."""
        if self.limiter is not None:
            await self.limiter.acquire()


class EndpointClient:
    """Posts requests to one endpoint.

    Args:
        config: endpoint and limits.
        wanted: what an answer is called in errors: a verdict, a turn.
        max_body_bytes: a server that sends more is broken.
    """

    def __init__(self, config: EndpointConfig, wanted: str = "answer", max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.config = config
        self.wanted = wanted
        self.max_body_bytes = max_body_bytes
        self.spent = Spent()
        self.key = os.environ.get(config.api_key_env, "")
        """Empty: none."""
        self._unknown: set[str] = set()
        """Options that the server says it does not know."""
        self._connection: _Connection | None = None

    # ------------------------------------------------------------------ requests
    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        read: Callable[[Any], T | None],
        needed: Collection[str] = (),
    ) -> T:
        """What `read` finds in the chat completion of messages.

        Args:
            messages: in OpenAI's form.
            options: sampling and the like. One that the server says it does not know is left out from then on, and
                `max_tokens` sent under its newer name.
            read: the answer in a body's JSON; None where there is none, which is worth another try.
            needed: options without which the answer would be another one's: a server that refuses them is an error.

        Raises:
            EndpointError: no answer within the tries and the time of the config, or a needed option is refused.
        """
        fixed = {"model": self.config.model, "messages": list(messages), **self.config.extra_fields}
        return await self.post("chat/completions", fixed, read, options, needed)

    async def post(
        self,
        path: str,
        fixed: Mapping[str, Any],
        read: Callable[[Any], T | None],
        options: Mapping[str, Any] | None = None,
        needed: Collection[str] = (),
    ) -> T:
        """As `chat`, for any path below the endpoint (or a whole address) and any body."""
        connection = self._connected()
        try:
            # The clock starts with the slot: waiting behind other requests is no fault of the server's. The slot is
            # kept through all tries, or a retry would queue up behind every request that came later.
            async with connection.slot() as http:
                await connection.paced()
                async with asyncio.timeout(self.config.give_up_s):
                    asked = dict(options or {}), frozenset(needed)
                    return await self._ask(connection, http, path, dict(fixed), *asked, read)
        except TimeoutError as error:
            self.spent.failed += 1
            message = f"no {self.wanted} from {self.config.base_url} within {self.config.give_up_s:g} s"
            raise EndpointError(f"{message}; the last trouble: {connection.trouble or 'none'}") from error
        except EndpointError:
            self.spent.failed += 1
            raise

    async def _ask(
        self,
        connection: _Connection,
        http: httpx.AsyncClient,
        path: str,
        fixed: dict[str, Any],
        options: dict[str, Any],
        needed: frozenset[str],
        read: Callable[[Any], T | None],
    ) -> T:
        """One answer with as many tries as the config allows."""
        enough = _EnoughFailures(self.config.max_attempts)
        tries = tenacity.AsyncRetrying(
            stop=enough,
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(TransientFailureError),
            reraise=True,
        )
        try:
            async for attempt in tries:
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        self.spent.retries += 1
                        await connection.paced()
                    async with connection.breaker.admitted():
                        sent = self._known(options)
                        body = await self._try_once(connection, http, path, fixed, sent, needed)
                    return self._read(connection, body, read)
        except TransientFailureError as error:
            message = f"{self.config.base_url} gave no {self.wanted} in {enough.failed} tries; the last: {error}"
            raise EndpointError(message) from error
        except OtherSideDownError as error:
            raise EndpointError(f"{self.config.base_url}: {error}; the last trouble: {connection.trouble}") from error
        raise AssertionError("tenacity either returns or raises")

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next try: what the server asked for and a little, else exponential with full jitter."""
        outcome = state.outcome.exception() if state.outcome is not None else None
        asked = outcome.retry_after_s if isinstance(outcome, TransientFailureError) else None
        if asked is not None:
            return min(asked, self.config.max_backoff_s) * random.uniform(1.0, 1.2)
        jittered = tenacity.wait_random_exponential(multiplier=0.5, max=self.config.max_backoff_s)
        return float(jittered(state))

    async def _try_once(
        self,
        connection: _Connection,
        http: httpx.AsyncClient,
        path: str,
        fixed: dict[str, Any],
        options: dict[str, Any],
        needed: frozenset[str],
    ) -> bytes:
        self.spent.requests += 1
        begun = connection.loop.time()
        try:
            async with asyncio.timeout(self.config.timeout_s):  # of the whole answer: a slow drip resets read time-outs
                status, headers, body = await self._send(http, path, options | fixed)
        except (httpx.HTTPError, TimeoutError) as error:
            connection.breaker.failed()
            connection.trouble = f"{type(error).__name__}: {error}"[:200]
            raise TransientFailureError(connection.trouble) from error
        if status != 200:
            if status == 400:
                self._do_without(options, needed, body)
            self._refuse(connection, status, headers, body)
        connection.breaker.succeeded()
        self.spent.latencies_s.append(connection.loop.time() - begun)
        return body

    async def _send(
        self, http: httpx.AsyncClient, path: str, request: dict[str, Any]
    ) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of one request; raises what httpx raises."""
        async with http.stream("POST", path, json=request) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > self.max_body_bytes:
                    raise httpx.DecodingError(f"more than {self.max_body_bytes} bytes", request=response.request)
        return response.status_code, response.headers, bytes(body)

    def _read(self, connection: _Connection, body: bytes, read: Callable[[Any], T | None]) -> T:
        try:
            value = json.loads(body)
            found = read(value)
        except (ValueError, RecursionError):
            value = found = None
        if found is None:
            connection.trouble = f"no {self.wanted} in {self._shown(body)!r}"
            raise TransientFailureError(connection.trouble)
        prompt_tokens, completion_tokens = usage(value)
        self.spent.prompt_tokens += prompt_tokens
        self.spent.completion_tokens += completion_tokens
        return found

    # ------------------------------------------------------------------ refusals
    def _known(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that the server has not refused, under the names that it knows."""
        known = {name: value for name, value in options.items() if name not in self._unknown}
        if "max_tokens" in options and "max_tokens" in self._unknown:
            known["max_completion_tokens"] = options["max_tokens"]  # its name with newer OpenAI models
        return known

    def _do_without(self, options: dict[str, Any], needed: frozenset[str], body: bytes) -> None:
        """Ask again without the options that a server says it does not know; raises if it named any.

        Options are those that this request had: others under way may have found out already.
        """
        unknown = {name for name in options if name.encode() in body}
        if not unknown or "max_completion_tokens" in unknown:
            return
        if unknown & {"logprobs", "top_logprobs"}:
            unknown |= {"logprobs", "top_logprobs"}
        if lost := unknown & needed:
            raise EndpointError(
                f"{self.config.base_url} refuses {', '.join(sorted(lost))}, without which it would not sample as "
                f"asked: {self._shown(body)}"
            )
        if new := unknown - self._unknown:
            LOG.warning("%s: asking without %s from now on (HTTP 400: %s)",
                        self.config.base_url, ", ".join(sorted(new)), self._shown(body))  # fmt: skip
        self._unknown |= unknown
        raise TransientFailureError(f"HTTP 400: {self._shown(body)}", 0.0, is_pacing=True)

    def _refuse(self, connection: _Connection, status: int, headers: httpx.Headers, body: bytes) -> None:
        """Raise what an answer other than 200 means."""
        connection.trouble = said = f"HTTP {status}: {self._shown(body)}"
        if status not in RETRIED_STATUS:
            raise EndpointError(f"{self.config.base_url} refuses the request: {said}")
        if status >= 500:
            connection.breaker.failed()
        asked = retry_after(headers.get("retry-after"))
        if asked is not None:
            connection.breaker.quiet(min(asked, self.config.max_backoff_s))
        raise TransientFailureError(said, asked, is_pacing=status == 429)

    def _shown(self, body: bytes) -> str:
        """Begin of a body for an error message; an echoed key is blotted out."""
        text = body[:2000].decode(errors="replace")
        return (text.replace(self.key, "***") if self.key else text)[:160]

    # ------------------------------------------------------------------ life cycle
    def _connected(self) -> _Connection:
        """The connection of the running loop, made on first use."""
        loop = asyncio.get_running_loop()
        if self._connection is None or self._connection.loop is not loop:
            config, rate = self.config, self.config.requests_per_s
            clients = _clients(config, self.key)
            slots: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
            for number in reversed(range(config.max_parallel)):
                slots.put_nowait(clients[number // POOL_SIZE])
            self._connection = _Connection(
                loop=loop,
                clients=clients,
                slots=slots,
                limiter=AsyncLimiter(max(1.0, rate), max(1.0, rate) / rate) if rate else None,
                breaker=CircuitBreaker(config.breaker_failures, config.breaker_pause_s, config.give_up_s),
            )
        return self._connection

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await asyncio.gather(*(client.aclose() for client in connection.clients))

    @property
    def cost(self) -> float:
        """Of what was spent so far, in the currency of the config's prices."""
        return self.config.cost(self.spent.prompt_tokens, self.spent.completion_tokens)


def usage(value: Any) -> tuple[int, int]:
    """Prompt and completion tokens of a body's `usage`; 0 where it tells none."""
    told = value.get("usage") if isinstance(value, dict) else None
    counts = [told.get(name) if isinstance(told, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt_tokens, completion_tokens = (int(n) if isinstance(n, int | float) and n >= 0 else 0 for n in counts)
    return prompt_tokens, completion_tokens


def _clients(config: EndpointConfig, key: str) -> list[httpx.AsyncClient]:
    """Clients of `POOL_SIZE` connections each, `max_parallel` in all."""
    context = httpx.create_ssl_context()  # shared: it takes longer to make than a client
    return [
        httpx.AsyncClient(
            base_url=config.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=POOL_SIZE, max_keepalive_connections=POOL_SIZE),
            trust_env=not is_local(config.base_url),
            verify=context,
        )
        for _ in range(math.ceil(config.max_parallel / POOL_SIZE))
    ]


def is_local(url: str) -> bool:
    """True for an endpoint on this machine, which no proxy of the environment can reach."""
    return httpx.URL(url).host in ("localhost", "127.0.0.1", "::1", "0.0.0.0")


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date; None if there is none to be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass  # not a number: a date
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
