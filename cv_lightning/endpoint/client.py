"""The client of a served model: one answer per request, or an `EndpointError`, however the server behaves.

The `openai` library sends requests and repeats failed ones; `PacedClient` below it applies rate limit, circuit breaker
and size limits. A client is used on one event loop at a time and never blocks it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from cv_lightning.endpoint.config import EndpointConfig, Spent
from cv_lightning.types import EndpointError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from cv_lightning.endpoint.paced import Pacing

LOG = logging.getLogger(__name__)

T = TypeVar("T")

POOL_SIZE = 4
"""Connections of one HTTP client. httpx looks at every idle connection for each request; with 64 of them that takes
longer than the request itself."""
MAX_BODY_BYTES = 1 << 24
"""Largest answer that is read."""


class EndpointClient:
    """Posts requests to one endpoint. `wanted` is the name of an answer in errors: a verdict, a turn."""

    def __init__(self, config: EndpointConfig, wanted: str = "answer", max_body_bytes: int = MAX_BODY_BYTES) -> None:
        import openai  # noqa: F401  # the import takes a second, too long for the event loop

        self.config = config
        self.wanted = wanted
        self.max_body_bytes = max_body_bytes
        self.spent = Spent()
        self.key = os.environ.get(config.api_key_env, "")
        """Empty without a key."""
        self._unknown: set[str] = set()
        """Options that the server has refused as unknown."""
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop that the connections belong to."""
        self._clients: list[AsyncOpenAI] = []
        self._slots: asyncio.LifoQueue[AsyncOpenAI]
        self._pacing: Pacing

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        read: Callable[[Any], T | None],
        needed: Collection[str] = (),
    ) -> T:
        """Send a chat and return what `read` finds in its completion.

        Args:
            messages: Messages in OpenAI's form.
            options: Sampling options. One that the server refuses as unknown is left out from then on, and
                `max_tokens` is sent under its newer name.
            read: Finds the answer in the JSON value of a body; None means that there is none, and the chat is repeated.
            needed: Options that must not be left out: a server that refuses them is an error.

        Raises:
            EndpointError: There was no answer within the attempts and the time of the config, or the server refused a
                needed option.
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
        """Post any body to a path below the endpoint or to a whole address; the rest is as in `chat`."""
        from cv_lightning.endpoint.paced import EndpointDownError

        slots, pacing = self._connect()
        pacing.spent = self.spent
        client = await slots.get()
        try:
            # The clock starts with the slot, because waiting behind other requests is not the server's failure. The
            # slot is kept through all attempts, so that a retry does not queue behind every later request.
            async with asyncio.timeout(self.config.give_up_s):
                return await self._ask(client, path, fixed, dict(options or {}), needed, read)
        except EndpointError:
            self.spent.failed += 1
            raise
        except (TimeoutError, EndpointDownError) as error:
            self.spent.failed += 1
            where = self.config.base_url
            late = f"no {self.wanted} from {where} within {self.config.give_up_s:g} s"
            message = late if isinstance(error, TimeoutError) else f"{where}: {error}"
            raise EndpointError(f"{message}; the last trouble: {pacing.trouble or 'none'}") from error
        finally:
            slots.put_nowait(client)

    async def _ask(
        self,
        client: AsyncOpenAI,
        path: str,
        fixed: Mapping[str, Any],
        options: dict[str, Any],
        needed: Collection[str],
        read: Callable[[Any], T | None],
    ) -> T:
        """One answer. The library repeats failed requests, this loop those with an unreadable answer."""
        import httpx2
        import openai

        headers = {} if self.key else {"Authorization": openai.Omit()}
        unreadable = 0
        while True:
            sent = self._known(options)
            body = {**sent, **fixed}
            try:
                response = await client.post(path, cast_to=httpx2.Response, body=body, options={"headers": headers})
            except openai.APIStatusError as error:
                said = error.response.content
                if error.status_code == 400 and self._can_do_without(sent, needed, said):
                    self.spent.retries += 1
                    continue
                shown = f"HTTP {error.status_code}: {self._shown(said)}"
                if error.status_code < 500 and error.status_code not in (408, 409):
                    raise EndpointError(f"{self.config.base_url} refuses the request: {shown}") from None
                raise self._gave_none(shown) from None
            except openai.APIConnectionError as error:  # a time-out is one, too
                cause = error.__cause__
                raise self._gave_none(f"{type(cause).__name__}: {cause}"[:200]) from error
            found = self._read(response.content, read)
            if found is not None:
                return found
            unreadable += 1
            if unreadable >= self.config.max_attempts:
                raise self._gave_none(repr(self._shown(response.content)))
            self.spent.retries += 1
            await asyncio.sleep(random.uniform(0.0, min(0.5 * 2.0**unreadable, self.config.max_backoff_s)))

    def _gave_none(self, last: str) -> EndpointError:
        tries = f"gave no {self.wanted} in {self.config.max_attempts} tries"
        return EndpointError(f"{self.config.base_url} {tries}; the last: {last}")

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

    def _can_do_without(self, options: dict[str, Any], needed: Collection[str], body: bytes) -> bool:
        """Note which of the sent options an error names as unknown; False if none, EndpointError for a needed one."""
        unknown = {name for name in options if name.encode() in body}
        if not unknown or "max_completion_tokens" in unknown:
            return False
        if unknown & {"logprobs", "top_logprobs"}:
            unknown |= {"logprobs", "top_logprobs"}
        if lost := unknown & set(needed):
            raise EndpointError(
                f"{self.config.base_url} refuses {', '.join(sorted(lost))}, without which it would not sample as "
                f"asked: {self._shown(body)}"
            )
        if new := unknown - self._unknown:  # another request under way may have found out already
            names = ", ".join(sorted(new))
            shown = self._shown(body)
            LOG.warning("%s: asking without %s from now on (HTTP 400: %s)", self.config.base_url, names, shown)
        self._unknown |= unknown
        return True

    def _shown(self, body: bytes) -> str:
        """Beginning of a body for an error message, with the key masked if the server echoes it."""
        text = body[:2000].decode(errors="replace")
        return (text.replace(self.key, "***") if self.key else text)[:160]

    # ------------------------------------------------------------------ life cycle
    def _connect(self) -> tuple[asyncio.LifoQueue[AsyncOpenAI], Pacing]:
        """Slots and pacing of the running loop, made on first use.

        Slots are one entry for each request that may be under way, `POOL_SIZE` to a client; waiters get them in order.
        """
        import httpx2
        from openai import AsyncOpenAI, Omit

        from cv_lightning.endpoint.paced import PacedClient, Pacing

        loop, config = asyncio.get_running_loop(), self.config
        if self._loop is loop:
            return self._slots, self._pacing
        self._loop, self._slots = loop, asyncio.LifoQueue()
        self._pacing = pacing = Pacing(config, self.spent, self.max_body_bytes)
        http: dict[str, Any] = {
            "timeout": config.timeout_s,
            "limits": httpx2.Limits(max_connections=POOL_SIZE, max_keepalive_connections=POOL_SIZE),
            "trust_env": not is_local(config.base_url),
            "verify": httpx2.create_ssl_context(),  # shared, because it takes longer to make than a client
        }
        # The environment's OpenAI account must not be sent to other servers.
        no_account: dict[str, Any] = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        self._clients = [
            AsyncOpenAI(
                base_url=config.base_url,
                api_key=self.key or "none",
                default_headers=no_account,
                timeout=config.timeout_s,
                max_retries=config.max_attempts - 1,
                http_client=PacedClient(pacing, follow_redirects=False, **http),
            )
            for _ in range(math.ceil(config.max_parallel / POOL_SIZE))
        ]
        for number in reversed(range(config.max_parallel)):
            self._slots.put_nowait(self._clients[number // POOL_SIZE])
        return self._slots, pacing

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        clients, self._clients, self._loop = self._clients, [], None
        await asyncio.gather(*(client.close() for client in clients))

    @property
    def cost(self) -> float:
        """Cost of `spent`, in the currency of the config's prices."""
        return self.config.cost(self.spent.prompt_tokens, self.spent.completion_tokens)


def usage(value: Any) -> tuple[int, int]:
    """Prompt and completion tokens of a body's `usage`; 0 where it does not say."""
    told = value.get("usage") if isinstance(value, dict) else None
    counts = [told.get(name) if isinstance(told, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt_tokens, completion_tokens = (int(n) if isinstance(n, int | float) and n >= 0 else 0 for n in counts)
    return prompt_tokens, completion_tokens


def is_local(url: str) -> bool:
    """True for an endpoint on this machine, which no proxy of the environment can reach."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1", "0.0.0.0")
