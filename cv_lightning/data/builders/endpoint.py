"""A teacher behind any OpenAI-compatible endpoint: the judge's client, asked for whole turns."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from cv_lightning.data.builders import phrases
from cv_lightning.data.builders.teacher import TurnRequest, Written, crop_arguments
from cv_lightning.images import fit_to_pixels
from cv_lightning.rewards.config import JudgeConfig
from cv_lightning.rewards.judge.client import Judge, TransientFailureError
from cv_lightning.rewards.judge.verdict import Verdict
from cv_lightning.types import JudgeError

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
            raise ValueError(
                f"--teacher.tries {self.tries} must be at least 1, --teacher.image_pixels {self.image_pixels} at least 0"
            )
        if self.prompt_file and not Path(self.prompt_file).is_file():
            raise ValueError(f"--teacher.prompt_file {self.prompt_file}: no such file")
        try:
            self.client_config()
        except ValueError as error:
            raise ValueError(str(error).replace("reward.judge.", "--teacher.")) from None

    def client_config(self) -> JudgeConfig:
        """What the judge's client needs of it."""
        names = (
            "base_url", "model", "api_key_env", "max_parallel", "requests_per_s", "timeout_s", "give_up_s",
            "max_attempts", "max_tokens", "temperature", "extra_fields", "price_per_million_prompt_tokens",
            "price_per_million_completion_tokens",
        )  # fmt: skip
        return JudgeConfig(logprobs=False, **{name: getattr(self, name) for name in names})


class Reply(Verdict):
    """A completion as the judge's client passes it on: its token counts and, beside them, its text."""

    text: str = ""


class ChatClient(Judge):
    """The judge's client for any messages: the same limits, retries, circuit breaker and counters, no cache."""

    async def complete(self, messages: Sequence[dict[str, Any]]) -> Reply:
        """A completion of messages.

        Raises:
            JudgeError: none within the attempts and the time of the config.
        """
        connection = self._connected()
        try:
            async with connection.slots:
                await connection.paced()
                async with asyncio.timeout(self.config.give_up_s):
                    reply = await self._ask(connection, json.dumps(list(messages)))
        except TimeoutError as error:
            self.counters.failed += 1
            raise JudgeError(
                f"no answer from {self.config.base_url} within {self.config.give_up_s:g} s; the last trouble: "
                f"{connection.trouble or 'none'}"
            ) from error
        except JudgeError:
            self.counters.failed += 1
            raise
        assert isinstance(reply, Reply)
        return reply

    async def _try_once(self, connection: Any, prompt: str) -> Verdict:
        self.counters.requests += 1
        begun, options = connection.loop.time(), self._options
        asked = {**options, "messages": json.loads(prompt)}
        try:
            async with asyncio.timeout(self.config.timeout_s):
                status, headers, body = await self._post(connection.http, prompt, asked)
        except (httpx.HTTPError, TimeoutError) as error:
            connection.breaker.failed()
            connection.trouble = f"{type(error).__name__}: {error}"[:200]
            raise TransientFailureError(connection.trouble) from error
        if status != 200:
            if status == 400:
                self._do_without(options, body)
            self._refuse(connection, status, headers, body)
        connection.breaker.succeeded()
        reply = read_reply(body)
        if reply is None:
            connection.trouble = f"no text in {self._shown(body)!r}"
            raise TransientFailureError(connection.trouble)
        self.counters.latencies_s.append(connection.loop.time() - begun)
        self.counters.prompt_tokens += reply.prompt_tokens
        self.counters.completion_tokens += reply.completion_tokens
        return reply


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
    reply = Reply(0.0, prompt_tokens, completion_tokens)
    reply.text = text
    return reply


# ------------------------------------------------------------------------------------------------ the teacher
class EndpointTeacher:
    """Asks a model for every turn, with the images so far and a directive that tells what the turn must do."""

    def __init__(self, config: TeacherConfig) -> None:
        """Read the prompt; nothing is sent yet."""
        self.config = config
        self.tries = config.tries
        self._client = ChatClient(config.client_config())
        self._prompt = Path(config.prompt_file or PROMPT_FILE).read_text(encoding="utf-8").strip()

    async def write(self, request: TurnRequest) -> Written:
        """The next turn; see `Teacher`."""
        messages = await asyncio.to_thread(self.messages, request)
        reply = await self._client.complete(messages)
        return Written(
            text=reply.text, prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens
        )

    def usage(self) -> dict[str, float]:
        """What this run spent; `cost` is in the currency of the config's prices."""
        spent, config = self._client.counters, self.config
        prices = config.price_per_million_prompt_tokens, config.price_per_million_completion_tokens
        names = ("requests", "retries", "failed", "prompt_tokens", "completion_tokens")
        cost = (spent.prompt_tokens * prices[0] + spent.completion_tokens * prices[1]) / 1e6
        return {**{name: float(getattr(spent, name)) for name in names}, "cost": cost}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

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
        lines.append(f"The call before went wrong ({step.repairs.replace('_', ' ')}). Say what you notice, and repair it.")
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
        wrong = " (which is wrong here; the thought believes in it)" if step.fault == "wrong_turn" else ""
        lines.append(f"Image {step.image_index} {seen}: {aim}{wrong}.")
    elif step.action == "crop":
        assert step.edges is not None
        before, edges = crop_arguments(step.edges, size, request.frame)
        code = f"{before}result = image.crop({edges})"
        wrong = " (which misses; the thought believes in it)" if step.fault == "missed_crop" else ""
        lines.append(f"Crop image {step.image_index} to what the question is about{wrong}; right coordinates: {code}")
    if step.action != "answer":
        lines.append(f"The call works on image_index {step.image_index}, which has {size[0]}x{size[1]} pixels.")
    if request.refusal:
        lines.append(f"Your last try was refused: {request.refusal}. Write the turn anew.")
    return "\n".join(lines)
