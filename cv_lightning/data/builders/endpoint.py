"""A teacher behind any OpenAI-compatible endpoint: the judge's client, asked for whole turns."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import tenacity
from aiolimiter import AsyncLimiter
from PIL import Image

from cv_lightning.data.builders import phrases
from cv_lightning.data.builders.teacher import TurnRequest, Written, crop_arguments
from cv_lightning.images import fit_to_pixels
from cv_lightning.rewards.config import JudgeConfig
from cv_lightning.rewards.judge.breaker import CircuitBreaker, OtherSideDownError
from cv_lightning.rewards.judge.client import RETRIED_STATUS, TransientFailureError
from cv_lightning.types import JudgeError

MAX_BACKOFF_S = 20.0
"""Longest wait between attempts."""
BREAKER_FAILURES, BREAKER_PAUSE_S = 8, 10.0
"""Failures in a row after which nothing is sent for so many seconds."""
PROMPT_FILE = Path(__file__).parent / "prompts" / "teacher.md"


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A vision-language model behind an OpenAI-compatible endpoint that writes assistant turns."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Endpoint; requests go to `<base_url>/chat/completions`."""
    model: str = "Qwen/Qwen3-VL-235B-A22B-Instruct"
    """Name under which the endpoint serves the model."""
    api_key_env: str = "TEACHER_API_KEY"
    """Environment variable that holds the key; unset means no key. The key itself is never part of a config."""
    tries: int = 3
    """Times that a turn is asked for, told each time why the last was refused, before its conversation is dropped."""
    prompt_file: str = ""
    """File with the teacher's system prompt; empty: the shipped one."""
    image_pixels: int = 1_000_000
    """Larger images are sent reduced to so many pixels, as JPEG; 0 sends none."""
    max_parallel: int = 16
    """Requests under way at once."""
    requests_per_s: float = 0.0
    """Rate limit; 0: none."""
    timeout_s: float = 120.0
    """Most seconds that one request may take."""
    give_up_s: float = 600.0
    """Most seconds that a turn may take with all its attempts and pauses."""
    max_attempts: int = 4
    """Failed requests per turn before its conversation is put off. HTTP 429 is no failure."""
    max_tokens: int = 1024
    """Tokens of a turn."""
    temperature: float = 0.8
    """Sampling temperature."""
    extra_fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as `reasoning_effort: high`. No place for keys."""
    price_per_million_prompt_tokens: float = 0.0
    """For the cost in the report; any currency."""
    price_per_million_completion_tokens: float = 0.0
    """For the cost in the report; any currency."""

    def __post_init__(self) -> None:
        if self.tries < 1 or self.image_pixels < 0:
            given = f"--teacher.tries {self.tries} and --teacher.image_pixels {self.image_pixels}"
            raise ValueError(f"{given} must be at least 1 and 0")
        if self.prompt_file and not Path(self.prompt_file).is_file():
            raise ValueError(f"--teacher.prompt_file {self.prompt_file}: no such file")
        try:  # the judge's client has the same endpoint, with the same rules
            names = "base_url api_key_env max_parallel requests_per_s timeout_s give_up_s max_attempts max_tokens"
            JudgeConfig(**{name: getattr(self, name) for name in [*names.split(), "temperature", "extra_fields"]})
        except ValueError as error:
            raise ValueError(str(error).replace("reward.judge.", "--teacher.")) from None


class Reply(NamedTuple):
    """A completion."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Spent:
    """What an endpoint was asked for so far."""

    requests: int = 0
    retries: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class _Connection:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    http: httpx.AsyncClient
    slots: asyncio.Semaphore
    limiter: AsyncLimiter | None
    breaker: CircuitBreaker


class ChatClient:
    """Completions, limited in number and rate, retried, paused by the judge's circuit breaker while the server is down.

    Args:
        config: endpoint and limits.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.spent = Spent()
        self._key = os.environ.get(config.api_key_env, "")
        self._connection: _Connection | None = None

    async def complete(self, messages: Sequence[dict[str, Any]]) -> Reply:
        """A completion of messages.

        Raises:
            JudgeError: none within the attempts and the time of the config.
        """
        connection, config = self._connected(), self.config
        tries = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(config.max_attempts),
            wait=_wait,
            retry=tenacity.retry_if_exception_type(TransientFailureError),
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            async with connection.slots, asyncio.timeout(config.give_up_s):
                return await tries(self._once, connection, messages)
        except (TransientFailureError, OtherSideDownError, TimeoutError) as error:
            self.spent.failed += 1
            why = str(error) or f"nothing within {config.give_up_s:g} s"
            raise JudgeError(f"{config.base_url} gave no turn: {why}") from error

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        self.spent.retries += 1

    async def _once(self, connection: _Connection, messages: Sequence[dict[str, Any]]) -> Reply:
        config = self.config
        request = {"model": config.model, "messages": list(messages), "max_tokens": config.max_tokens}
        request |= {"temperature": config.temperature, **config.extra_fields}
        async with connection.breaker.admitted():
            if connection.limiter is not None:
                await connection.limiter.acquire()
            self.spent.requests += 1
            try:
                async with asyncio.timeout(config.timeout_s):
                    response = await connection.http.post("chat/completions", json=request)
            except (httpx.HTTPError, TimeoutError) as error:
                connection.breaker.failed()
                raise TransientFailureError(f"{type(error).__name__}: {error}"[:200]) from error
            if response.status_code != 200:
                self._refuse(connection, response)
            connection.breaker.succeeded()
        reply = read_reply(response.content)
        if reply is None:
            raise TransientFailureError(f"no text in {self._shown(response.text)!r}")
        self.spent.prompt_tokens += reply.prompt_tokens
        self.spent.completion_tokens += reply.completion_tokens
        return reply

    def _refuse(self, connection: _Connection, response: httpx.Response) -> None:
        """Raise what an answer other than 200 means."""
        said = f"HTTP {response.status_code}: {self._shown(response.text)}"
        if response.status_code not in RETRIED_STATUS:
            self.spent.failed += 1
            raise JudgeError(f"{self.config.base_url} refuses the request: {said}")
        if response.status_code >= 500:
            connection.breaker.failed()
        asked = response.headers.get("retry-after", "")
        seconds = min(float(asked), MAX_BACKOFF_S) if asked.replace(".", "", 1).isdecimal() else None
        if seconds is not None:
            connection.breaker.quiet(seconds)
        raise TransientFailureError(said, seconds, is_pacing=response.status_code == 429)

    def _shown(self, text: str) -> str:
        """Begin of a body for an error message; an echoed key is blotted out."""
        return (text[:2000].replace(self._key, "***") if self._key else text)[:160]

    def _connected(self) -> _Connection:
        """The connection of the running loop, made on first use."""
        loop, config = asyncio.get_running_loop(), self.config
        if self._connection is None or self._connection.loop is not loop:
            rate = config.requests_per_s
            is_local = httpx.URL(config.base_url).host in ("localhost", "127.0.0.1", "::1")
            self._connection = _Connection(
                loop=loop,
                http=httpx.AsyncClient(
                    base_url=config.base_url,
                    headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                    timeout=config.timeout_s,
                    trust_env=not is_local,  # no proxy of the environment reaches this machine
                ),
                slots=asyncio.Semaphore(config.max_parallel),
                limiter=AsyncLimiter(max(1.0, rate), max(1.0, rate) / rate) if rate else None,
                breaker=CircuitBreaker(BREAKER_FAILURES, BREAKER_PAUSE_S, config.give_up_s),
            )
        return self._connection

    async def close(self) -> None:
        """Close the connections of the running loop."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.http.aclose()


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: what the server asked for, else exponential with full jitter."""
    outcome = state.outcome.exception() if state.outcome is not None else None
    asked = outcome.retry_after_s if isinstance(outcome, TransientFailureError) else None
    return asked if asked is not None else float(tenacity.wait_random_exponential(0.5, MAX_BACKOFF_S)(state))


def read_reply(body: bytes) -> Reply | None:
    """The text of a chat completion; None where there is none. A server's own reasoning is left out."""
    try:
        value = json.loads(body)
        text = value["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError):
        return None
    if not isinstance(text, str) or not text.strip():
        return None
    usage = value.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt_tokens, completion_tokens = (int(n) if isinstance(n, int | float) and n >= 0 else 0 for n in counts)
    return Reply(text, prompt_tokens, completion_tokens)


# ------------------------------------------------------------------------------------------------ the teacher
class EndpointTeacher:
    """Asks a model for every turn, with the images so far and a directive that tells what the turn must do."""

    def __init__(self, config: TeacherConfig) -> None:
        """Read the prompt; nothing is sent yet."""
        self.config = config
        self.tries = config.tries
        self._client = ChatClient(config)
        self._prompt = Path(config.prompt_file or PROMPT_FILE).read_text(encoding="utf-8").strip()

    async def write(self, request: TurnRequest) -> Written:
        """The next turn; see `Teacher`."""
        messages = await asyncio.to_thread(self.messages, request)
        reply = await self._client.complete(messages)
        return Written(text=reply.text, prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)

    def usage(self) -> dict[str, float]:
        """What this run spent; `cost` is in the currency of the config's prices."""
        spent, config = self._client.spent, self.config
        prices = config.price_per_million_prompt_tokens, config.price_per_million_completion_tokens
        names = ("requests", "retries", "failed", "prompt_tokens", "completion_tokens")
        cost = (spent.prompt_tokens * prices[0] + spent.completion_tokens * prices[1]) / 1e6
        return {**{name: float(getattr(spent, name)) for name in names}, "cost": cost}

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def messages(self, request: TurnRequest) -> list[dict[str, Any]]:
        """The chat that asks for a turn: prompt, conversation so far, directive."""
        first = [*self._image(request.images[0]), _text(request.row.question)]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": self._prompt},
            {"role": "user", "content": first},
        ]
        for said in request.said:
            if said.role == "assistant":
                messages.append({"role": "assistant", "content": said.text})
                continue
            parts = [_text("<tool_response>")]
            parts += self._image(said.image) if said.image is not None else [_text(said.text)]
            messages.append({"role": "user", "content": [*parts, _text("</tool_response>")]})
        told = {"role": "user", "content": [_text(directive(request))]}
        return [*messages, told]

    def _image(self, image: Image.Image) -> list[dict[str, Any]]:
        if not self.config.image_pixels:
            return []
        size = fit_to_pixels(*image.size, min_pixels=1, max_pixels=self.config.image_pixels)
        assert size is not None
        buffer = io.BytesIO()
        (image if size == image.size else image.resize(size)).save(buffer, format="JPEG", quality=90)
        data = base64.b64encode(buffer.getvalue()).decode()
        return [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def directive(request: TurnRequest) -> str:
    """What the turn must do, for the teacher alone."""
    step, size = request.step, request.images[request.step.image_index].size
    lines = [f"Directive for turn {request.number + 1} of {len(request.plan.steps)}:"]
    if step.repairs is not None:
        lines.append(
            f"The call before went wrong ({step.repairs.replace('_', ' ')}). Say what you notice, and repair it."
        )
    if step.action == "answer":
        lines.append(f"Answer now. The answer must say: {request.row.answer}")
    elif step.fault == "exception":
        lines.append(
            "Make a mistake in the code that a programmer would make (a misspelt method, an undefined name, a missing "
            "bracket), so that it raises an exception when it runs. The thought must not know of it."
        )
    if step.action == "turn":
        seen = phrases.STATE[step.undoes]
        aim = f"{phrases.UNDO[step.undoes]}, and do nothing else"
        note = " (which is wrong here; the thought believes in it)" if step.fault == "wrong_turn" else ""
        lines.append(f"Image {step.image_index} {seen}: {aim}{note}.")
    elif step.action == "crop":
        assert step.edges is not None
        before, edges = crop_arguments(step.edges, size, request.frame)
        code = f"{before}result = image.crop({edges})"
        note = " (which misses; the thought believes in it)" if step.fault == "missed_crop" else ""
        lines.append(
            f"Crop image {step.image_index} to what the question is about{note}, with these coordinates: {code}"
        )
    if step.action != "answer":
        lines.append(f"The call works on image_index {step.image_index}, which has {size[0]}x{size[1]} pixels.")
    if request.refusal:
        lines.append(f"Your last try was refused: {request.refusal}. Write the turn anew.")
    return "\n".join(lines)
