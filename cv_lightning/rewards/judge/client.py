"""The judge's client: one verdict per question, however the endpoint behaves.

Runs on one event loop at a time and never blocks it. A verdict is a number or a `JudgeError`, never a guess.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
import tenacity
from aiolimiter import AsyncLimiter

from cv_lightning.rewards.config import JudgeConfig
from cv_lightning.rewards.judge.breaker import CircuitBreaker, OtherSideDownError
from cv_lightning.rewards.judge.cache import VerdictCache, cache_key
from cv_lightning.rewards.judge.prompts import load_prompt
from cv_lightning.rewards.judge.verdict import Verdict, read_verdict
from cv_lightning.types import JudgeError

POOL_SIZE = 4
"""Connections of one client: httpx looks at every idle one of a pool for each request, which takes more time at 64 than
the request itself."""
MAX_BODY_BYTES = 1 << 20
"""A verdict with its probabilities takes a few kB; a server that sends more than this is broken."""
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
class JudgeCounters:
    """What happened since the counters were last read."""

    verdicts: int = 0
    cached: int = 0
    shared: int = 0
    """Verdicts that joined a request already under way for the same question."""
    failed: int = 0
    requests: int = 0
    retries: int = 0
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
    flying: dict[str, asyncio.Task[float]] = field(default_factory=dict)
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


class Judge:
    """Asks for verdicts: cached, deduplicated, limited in number and rate, retried, paused while the server is down."""

    def __init__(self, config: JudgeConfig) -> None:
        """Read the prompts and open the cache; nothing is sent yet.

        Args:
            config: endpoint and limits.

        Raises:
            ValueError: a task type has no prompt.
        """
        self.config = config
        types = {config.default_task_type, *config.task_types.values()}
        self._prompts = {name: load_prompt(name, config.prompt_folder) for name in sorted(types)}
        self._cache = VerdictCache(config.cache_folder, config.cache_megabytes)
        self._key = os.environ.get(config.api_key_env, "")
        self._options: dict[str, object] = {"max_tokens": config.max_tokens, "temperature": config.temperature}
        if config.logprobs:
            self._options |= {"logprobs": True, "top_logprobs": 5}
        self._connection: _Connection | None = None
        self.counters = JudgeCounters()

    # ------------------------------------------------------------------ verdicts
    async def verdict(self, question: str, ground_truth: str, answer: str, data_source: str = "unknown") -> float:
        """Whether an answer says the same as the ground truth.

        Args:
            question: the bare question.
            ground_truth: the right answer.
            answer: the given answer.
            data_source: picks the prompt.

        Returns:
            In [0, 1]; right above 0.5.

        Raises:
            JudgeError: no verdict within the tries and the time of the config.
        """
        config = self.config
        prompt = self._prompts[config.task_types.get(data_source, config.default_task_type)]
        settings = [config.model, prompt.version, config.temperature, config.extra_fields]
        key = cache_key([*settings, question, ground_truth, answer])
        self.counters.verdicts += 1
        connection = self._connected()
        task = connection.flying.get(key)
        if task is None:
            work = self._find(connection, key, prompt.fill(question, ground_truth, answer))
            task = connection.loop.create_task(work)
            connection.flying[key] = task
            task.add_done_callback(lambda done: _forget(connection, key, done))
        else:
            self.counters.shared += 1
        try:
            return await asyncio.shield(task)
        except JudgeError:
            self.counters.failed += 1
            raise

    async def _find(self, connection: _Connection, key: str, prompt: str) -> float:
        known = await self._cache.get(key)
        if known is not None:
            self.counters.cached += 1
            return known
        try:
            # The clock starts with the slot: waiting behind other questions is no fault of the server's. The slot is
            # kept through all tries, or a retry would queue up behind every question that came later.
            async with connection.slot() as http:
                await connection.paced()
                async with asyncio.timeout(self.config.give_up_s):
                    verdict = await self._ask(connection, http, prompt)
        except TimeoutError as error:
            message = f"no verdict from {self.config.base_url} within {self.config.give_up_s:g} s"
            raise JudgeError(f"{message}; the last trouble: {connection.trouble or 'none'}") from error
        await self._cache.put(key, verdict.value)
        return verdict.value

    async def _ask(self, connection: _Connection, http: httpx.AsyncClient, prompt: str) -> Verdict:
        """One verdict with as many tries as the config allows."""
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
                        self.counters.retries += 1
                        await connection.paced()
                    async with connection.breaker.admitted():
                        return await self._try_once(connection, http, prompt)
        except TransientFailureError as error:
            message = f"{self.config.base_url} gave no verdict in {enough.failed} tries; the last: {error}"
            raise JudgeError(message) from error
        except OtherSideDownError as error:
            raise JudgeError(f"{self.config.base_url}: {error}; the last trouble: {connection.trouble}") from error
        raise AssertionError("tenacity either returns or raises")

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next try: what the server asked for and a little, else exponential with full jitter."""
        outcome = state.outcome.exception() if state.outcome is not None else None
        asked = outcome.retry_after_s if isinstance(outcome, TransientFailureError) else None
        if asked is not None:
            return min(asked, self.config.max_backoff_s) * random.uniform(1.0, 1.2)
        jittered = tenacity.wait_random_exponential(multiplier=0.5, max=self.config.max_backoff_s)
        return float(jittered(state))

    async def _try_once(self, connection: _Connection, http: httpx.AsyncClient, prompt: str) -> Verdict:
        self.counters.requests += 1
        begun, options = connection.loop.time(), self._options
        try:
            async with asyncio.timeout(self.config.timeout_s):  # of the whole answer: a slow drip resets read time-outs
                status, headers, body = await self._post(http, prompt, options)
        except (httpx.HTTPError, TimeoutError) as error:
            connection.breaker.failed()
            connection.trouble = f"{type(error).__name__}: {error}"[:200]
            raise TransientFailureError(connection.trouble) from error
        if status != 200:
            if status == 400:
                self._do_without(options, body)
            self._refuse(connection, status, headers, body)
        connection.breaker.succeeded()
        try:
            verdict = read_verdict(json.loads(body))
        except (ValueError, RecursionError):
            verdict = None
        if verdict is None:
            connection.trouble = f"no verdict in {self._shown(body)!r}"
            raise TransientFailureError(connection.trouble)
        self.counters.latencies_s.append(connection.loop.time() - begun)
        self.counters.prompt_tokens += verdict.prompt_tokens
        self.counters.completion_tokens += verdict.completion_tokens
        return verdict

    async def _post(
        self, http: httpx.AsyncClient, prompt: str, options: dict[str, object]
    ) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of one request; raises what httpx raises."""
        messages = [{"role": "user", "content": prompt}]
        request = {"model": self.config.model, "messages": messages, **options, **self.config.extra_fields}
        async with http.stream("POST", "chat/completions", json=request) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise httpx.DecodingError(f"more than {MAX_BODY_BYTES} bytes", request=response.request)
        return response.status_code, response.headers, bytes(body)

    def _do_without(self, options: dict[str, object], body: bytes) -> None:
        """Ask again without the options that a server says it does not know; raises if it named any.

        Options are those that this request had: others under way may have found out already.
        """
        unknown = {name for name in options if name.encode() in body}
        if not unknown or "max_completion_tokens" in unknown:
            return
        if unknown & {"logprobs", "top_logprobs"}:
            unknown |= {"logprobs", "top_logprobs"}
        self._options = {name: value for name, value in self._options.items() if name not in unknown}
        if "max_tokens" in unknown:
            self._options["max_completion_tokens"] = self.config.max_tokens  # its name with newer OpenAI models
        raise TransientFailureError(f"HTTP 400: {self._shown(body)}", 0.0, is_pacing=True)

    def _refuse(self, connection: _Connection, status: int, headers: httpx.Headers, body: bytes) -> None:
        """Raise what an answer other than 200 means."""
        connection.trouble = said = f"HTTP {status}: {self._shown(body)}"
        if status not in RETRIED_STATUS:
            raise JudgeError(f"{self.config.base_url} refuses the request: {said}")
        if status >= 500:
            connection.breaker.failed()
        asked = _retry_after(headers.get("retry-after"))
        if asked is not None:
            connection.breaker.quiet(min(asked, self.config.max_backoff_s))
        raise TransientFailureError(said, asked, is_pacing=status == 429)

    def _shown(self, body: bytes) -> str:
        """Begin of a body for an error message; an echoed key is blotted out."""
        text = body[:2000].decode(errors="replace")
        return (text.replace(self._key, "***") if self._key else text)[:160]

    # ------------------------------------------------------------------ life cycle
    def _connected(self) -> _Connection:
        """The connection of the running loop, made on first use."""
        loop = asyncio.get_running_loop()
        if self._connection is None or self._connection.loop is not loop:
            config, rate = self.config, self.config.requests_per_s
            clients = _clients(config, self._key)
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

    def metrics(self) -> dict[str, float]:
        """Figures since the last call, always the same names: counts, shares, seconds (0 without requests), tokens.

        `cost` is in the currency of the config's prices, 0 where they are 0.
        """
        found, self.counters = self.counters, JudgeCounters()
        names = ("verdicts", "failed", "requests", "retries", "prompt_tokens", "completion_tokens")
        values = {name: float(getattr(found, name)) for name in names}
        values["cached_frac"] = found.cached / max(1, found.verdicts)
        values["shared_frac"] = found.shared / max(1, found.verdicts)
        prices = self.config.price_per_million_prompt_tokens, self.config.price_per_million_completion_tokens
        values["cost"] = (found.prompt_tokens * prices[0] + found.completion_tokens * prices[1]) / 1e6
        latencies = sorted(found.latencies_s) or [0.0]
        values["latency_mean_s"] = sum(latencies) / len(latencies)
        values["latency_p95_s"] = latencies[math.ceil(0.95 * len(latencies)) - 1]
        values["latency_max_s"] = latencies[-1]
        return values

    def close(self) -> None:
        """Close connections and cache; safe whether or not the loop still runs, but not to be called on it."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.loop.is_running():
            asyncio.run_coroutine_threadsafe(_shut(connection), connection.loop).result(timeout=10)
        self._cache.close()


async def _shut(connection: _Connection) -> None:
    tasks = list(connection.flying.values())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*(client.aclose() for client in connection.clients))


def _forget(connection: _Connection, key: str, task: asyncio.Task[float]) -> None:
    connection.flying.pop(key, None)
    if not task.cancelled():
        task.exception()  # marks it as seen even where every caller was cancelled


def _clients(config: JudgeConfig, key: str) -> list[httpx.AsyncClient]:
    """Clients of `POOL_SIZE` connections each, `max_parallel` in all."""
    context = httpx.create_ssl_context()  # shared: it takes longer to make than a client
    return [
        httpx.AsyncClient(
            base_url=config.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=POOL_SIZE, max_keepalive_connections=POOL_SIZE),
            trust_env=not _is_local(config.base_url),
            verify=context,
        )
        for _ in range(math.ceil(config.max_parallel / POOL_SIZE))
    ]


def _is_local(url: str) -> bool:
    """True for an endpoint on this machine, which no proxy of the environment can reach."""
    return httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")


def _retry_after(value: str | None) -> float | None:
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
