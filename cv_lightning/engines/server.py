"""A served model as an engine, for evaluations and data: any OpenAI-compatible server, by text or by tokens.

`chat` sends the conversation as messages and reads text; the text is tokenised for the record only and never trained
on. `tokens` sends the ids themselves to vLLM's `/inference/v1/generate`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2

from cv_lightning.endpoint.messages import text_part
from cv_lightning.engines.base import Completion, EngineConfig, Request
from cv_lightning.engines.remote import RemoteEngine
from cv_lightning.images import content_hash
from cv_lightning.models.adapters.base import LOGIT_BAN, ModelAdapter
from cv_lightning.types import EngineError


class ServerEngine(RemoteEngine):
    """A served model that keeps its own weights."""

    def __init__(self, config: EngineConfig, adapter: ModelAdapter) -> None:
        """Check that the server answers and serves the model.

        Args:
            config: `server`, `max_model_len` and `max_images` are used.
            adapter: Adapter of the served model, or of any model if its own is unknown: it sizes images and counts
                tokens.

        Raises:
            EngineError: The server does not answer, or serves other models.
        """
        super().__init__(config, adapter)
        self.by_tokens = self.server.api == "tokens"
        self.generate_url = str(httpx2.URL(self.server.base_url).join("/inference/v1/generate"))
        try:
            self._check_model()
        except EngineError:
            self.close()
            raise

    def _check_model(self) -> None:
        listed = self.get(f"{self.server.base_url.rstrip('/')}/models")
        if listed is None:  # not every server lists its models
            return
        names = [entry.get("id") for entry in listed.get("data", []) if isinstance(entry, dict)]
        if names and self.server.model not in names:
            raise EngineError(
                f"engine.server.model {self.server.model!r} is not served at {self.server.base_url}, which has "
                f"{', '.join(map(str, names[:10]))}"
            )

    async def complete(self, request: Request) -> Completion:
        """See `RemoteEngine`."""
        urls = await asyncio.to_thread(self.urls, request)
        return await (self._by_tokens(request, urls) if self.by_tokens else self._by_text(request, urls))

    # ------------------------------------------------------------------ text
    async def _by_text(self, request: Request, urls: list[str]) -> Completion:
        prompt = self.tokenizer.decode(
            list(request.prompt_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        options = {"max_tokens": request.max_tokens, "temperature": request.temperature}
        options |= {"top_p": request.top_p, "seed": request.seed % 2**31}
        needed = [name for name in ("temperature", "top_p") if options[name] != 1]
        messages = messages_of(self.adapter.messages_of(str(prompt)), urls)
        text, reason = await self.client.chat(messages, options, _read_text, needed)
        if reason not in ("stop", "length"):
            raise EngineError(f"{self.server.base_url} ended a turn by {reason!r}; only stop and length are known")
        # Nothing that a model writes may pass for a control token of our own template.
        ids = list(self.tokenizer(text.replace("<|", "< |"), add_special_tokens=False)["input_ids"])
        ids = [*ids, self.adapter.end_id] if reason == "stop" else ids
        return Completion(id=request.id, token_ids=ids, logprobs=None, stopped=reason == "stop", prompt_ids=None)

    # ------------------------------------------------------------------ tokens
    async def _by_tokens(self, request: Request, urls: list[str]) -> Completion:
        sampling = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop_token_ids": [self.adapter.end_id],
            "logprobs": 0,
            "detokenize": False,
            "logit_bias": {str(token): LOGIT_BAN for token in request.banned_ids},
        }
        body: dict[str, Any] = {"model": self.server.model, "token_ids": list(request.prompt_ids)}
        body |= {"sampling_params": sampling, "return_token_ids": True}
        if urls:
            names = map(content_hash, request.images)
            parts = [{"type": "image_url", "url": url, "uuid": name} for url, name in zip(urls, names, strict=True)]
            body["content_parts"] = parts
        return await self.client.post(self.generate_url, body, lambda value: _read_tokens(request.id, value))


def messages_of(pieces: list[tuple[str, list[str]]], urls: list[str]) -> list[dict[str, Any]]:
    """Messages as OpenAI-compatible servers take them.

    Args:
        pieces: (role, text before, between and after its images) of each message.
        urls: An address for each image.
    """
    remaining = iter(urls)
    messages: list[dict[str, Any]] = []
    for role, texts in pieces:
        parts = [text_part(texts[0])] if texts[0] else []
        for text in texts[1:]:
            parts.append({"type": "image_url", "image_url": {"url": next(remaining)}})
            parts += [text_part(text)] if text else []
        messages.append({"role": role, "content": parts if len(texts) > 1 else texts[0]})
    return messages


def _read_text(body: Any) -> tuple[str, str] | None:
    """Text and finish reason. The text may be empty, for example if the thoughts took all tokens."""
    try:
        choice = body["choices"][0]
        text, reason = choice["message"].get("content") or "", choice.get("finish_reason") or "stop"
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return (text, str(reason)) if isinstance(text, str) else None


def _read_tokens(name: str, body: Any) -> Completion | None:
    try:
        choice = body["choices"][0]
        ids = [int(token) for token in choice["token_ids"]]
        logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
        reason, prompt = choice["finish_reason"], body["prompt_token_ids"]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    if len(ids) != len(logprobs) or not ids or reason not in ("stop", "length"):
        return None
    return Completion(
        id=name, token_ids=ids, logprobs=logprobs, stopped=reason == "stop", prompt_ids=[int(i) for i in prompt]
    )
