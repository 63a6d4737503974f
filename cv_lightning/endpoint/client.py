"""The client of a served model: one answer per request, however the server behaves.

The `openai` library sends, times out and tries again; beneath it `PacedClient` keeps rate, breaker and limits. Runs on
one event loop at a time and never blocks it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from cv_lightning.endpoint.breaker import OtherSideDownError
from cv_lightning.endpoint.config import EndpointConfig, Spent
from cv_lightning.types import EndpointError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from cv_lightning.endpoint.paced import Pacing

LOG = logging.getLogger(__name__)

T = TypeVar("T")

POOL_SIZE = 4
"""Connections of one HTTP client: it looks at every idle one for each request, which takes more time at 64 than the
request itself."""
MAX_BODY_BYTES = 1 << 24
"""Largest answer that is read."""


@dataclass(slots=True)
class _Connection:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    clients: list[AsyncOpenAI]
    slots: asyncio.LifoQueue[AsyncOpenAI]
    """One entry for each request that may be under way: the client that sends it."""
    pacing: Pacing

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[AsyncOpenAI]:
        """Wait for a turn; waiters are served in order."""
        client = await self.slots.get()
        try:
            yield client
        finally:
            self.slots.put_nowait(client)


class EndpointClient:
    """Posts requests to one endpoint.

    Args:
        config: endpoint and limits.
        wanted: what an answer is called in errors: a verdict, a turn.
        max_body_bytes: a server that sends more is broken.
    """

    def __init__(self, config: EndpointConfig, wanted: str = "answer", max_body_bytes: int = MAX_BODY_BYTES) -> None:
        import openai  # noqa: F401  # takes a second, which an event loop should not wait

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
        connection.pacing.spent = self.spent
        try:
            # The clock starts with the slot: waiting behind other requests is no fault of the server's. The slot is
            # kept through all tries, or a retry would queue up behind every request that came later.
            async with connection.slot() as client, asyncio.timeout(self.config.give_up_s):
                return await self._ask(client, path, fixed, dict(options or {}), frozenset(needed), read)
        except TimeoutError as error:
            self.spent.failed += 1
            message = f"no {self.wanted} from {self.config.base_url} within {self.config.give_up_s:g} s"
            raise EndpointError(f"{message}; the last trouble: {self._trouble(connection)}") from error
        except OtherSideDownError as error:
            self.spent.failed += 1
            message = f"{self.config.base_url}: {error}; the last trouble: {self._trouble(connection)}"
            raise EndpointError(message) from error
        except EndpointError:
            self.spent.failed += 1
            raise

    async def _ask(
        self,
        client: AsyncOpenAI,
        path: str,
        fixed: Mapping[str, Any],
        options: dict[str, Any],
        needed: frozenset[str],
        read: Callable[[Any], T | None],
    ) -> T:
        """One answer. The library repeats failed requests; here answers that cannot be read are asked for again."""
        tries = 0
        while True:
            body = await self._answer(client, path, {**self._known(options), **fixed}, options, needed)
            if body is None:  # asked again without options that the server does not know
                self.spent.retries += 1
                continue
            found = self._read(body, read)
            if found is not None:
                return found
            tries += 1
            if tries >= self.config.max_attempts:
                message = f"{self.config.base_url} gave no {self.wanted} in {tries} tries; the last"
                raise EndpointError(f"{message}: {self._shown(body)!r}")
            self.spent.retries += 1
            await asyncio.sleep(random.uniform(0.0, min(0.5 * 2.0**tries, self.config.max_backoff_s)))

    async def _answer(
        self,
        client: AsyncOpenAI,
        path: str,
        request: dict[str, Any],
        options: dict[str, Any],
        needed: frozenset[str],
    ) -> bytes | None:
        """Body of a successful answer; None where the request has to be sent again without some options."""
        import httpx2
        import openai

        where, tries = self.config.base_url, self.config.max_attempts
        try:
            headers = {} if self.key else {"Authorization": openai.Omit()}
            response = await client.post(path, cast_to=httpx2.Response, body=request, options={"headers": headers})
        except openai.APIStatusError as error:
            body, said = error.response.content, f"HTTP {error.status_code}: {self._shown(error.response.content)}"
            if error.status_code == 400 and self._can_do_without(options, needed, body):
                return None
            if error.status_code < 500 and error.status_code not in (408, 409):
                raise EndpointError(f"{where} refuses the request: {said}") from None
            raise EndpointError(f"{where} gave no {self.wanted} in {tries} tries; the last: {said}") from None
        except openai.APIConnectionError as error:  # also of a time-out
            said = f"{type(error.__cause__).__name__}: {error.__cause__}"[:200]
            raise EndpointError(f"{where} gave no {self.wanted} in {tries} tries; the last: {said}") from error
        return response.content

    def _read(self, body: bytes, read: Callable[[Any], T | None]) -> T | None:
        try:
            value = json.loads(body)
            found = read(value)
        except (ValueError, RecursionError):
            return None
        if found is not None:
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

    def _can_do_without(self, options: dict[str, Any], needed: frozenset[str], body: bytes) -> bool:
        """Note the options that a server says it does not know; False if it named none.

        Options are those that this request had: others under way may have found out already.

        Raises:
            EndpointError: one of them is needed.
        """
        unknown = {name for name in options if name.encode() in body}
        if not unknown or "max_completion_tokens" in unknown:
            return False
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
        return True

    def _shown(self, body: bytes) -> str:
        """Begin of a body for an error message, with the key masked if the server echoes it."""
        text = body[:2000].decode(errors="replace")
        return (text.replace(self.key, "***") if self.key else text)[:160]

    def _trouble(self, connection: _Connection) -> str:
        return connection.pacing.trouble or "none"

    # ------------------------------------------------------------------ life cycle
    def _connected(self) -> _Connection:
        """The connection of the running loop, made on first use."""
        from cv_lightning.endpoint.paced import Pacing

        loop = asyncio.get_running_loop()
        if self._connection is None or self._connection.loop is not loop:
            pacing = Pacing(self.config, self.spent, self.max_body_bytes)
            clients = _clients(self.config, self.key, pacing)
            slots: asyncio.LifoQueue[AsyncOpenAI] = asyncio.LifoQueue()
            for number in reversed(range(self.config.max_parallel)):
                slots.put_nowait(clients[number // POOL_SIZE])
            self._connection = _Connection(loop=loop, clients=clients, slots=slots, pacing=pacing)
        return self._connection

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await asyncio.gather(*(client.close() for client in connection.clients))

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


def _clients(config: EndpointConfig, key: str, pacing: Pacing) -> list[AsyncOpenAI]:
    """Clients of `POOL_SIZE` connections each, `max_parallel` in all."""
    import httpx2
    from openai import AsyncOpenAI, Omit

    from cv_lightning.endpoint.paced import PacedClient

    context = httpx2.create_ssl_context()  # shared: it takes longer to make than a client
    # Nothing of the environment's OpenAI account goes to another server.
    headers: dict[str, Any] = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
    return [
        AsyncOpenAI(
            base_url=config.base_url,
            api_key=key or "none",
            default_headers=headers,
            timeout=config.timeout_s,
            max_retries=config.max_attempts - 1,
            http_client=PacedClient(
                pacing,
                timeout=config.timeout_s,
                limits=httpx2.Limits(max_connections=POOL_SIZE, max_keepalive_connections=POOL_SIZE),
                trust_env=not is_local(config.base_url),
                verify=context,
                follow_redirects=False,
            ),
        )
        for _ in range(math.ceil(config.max_parallel / POOL_SIZE))
    ]


def is_local(url: str) -> bool:
    """True for an endpoint on this machine, which no proxy of the environment can reach."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1", "0.0.0.0")
