"""The judge's client: one verdict per question, or a `JudgeError`; it never guesses."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

from cv_lightning.endpoint.client import EndpointClient
from cv_lightning.endpoint.config import Spent
from cv_lightning.rewards.judge.cache import VerdictCache, cache_key
from cv_lightning.rewards.judge.config import JudgeConfig
from cv_lightning.rewards.judge.prompts import load_prompt
from cv_lightning.rewards.judge.verdict import GRAMMAR, read_text, read_verdict
from cv_lightning.types import EndpointError, JudgeError

MAX_BODY_BYTES = 1 << 20
"""A verdict with its probabilities takes a few kB; a server that sends more than this is broken."""


class Judge:
    """Asks for verdicts. They are cached, and equal questions that are under way share one request."""

    def __init__(self, config: JudgeConfig) -> None:
        """Read the prompts and open the cache; nothing is sent yet.

        Args:
            config: Endpoint and limits.

        Raises:
            ValueError: A task type has no prompt.
        """
        self.config = config
        types = {config.default_task_type, *config.task_types.values()}
        self._prompts = {name: load_prompt(name, config.prompt_folder) for name in sorted(types)}
        self._cache = VerdictCache(config.cache_folder, config.cache_megabytes)
        self._client = EndpointClient(config, "verdict", MAX_BODY_BYTES)
        self._options: dict[str, object] = {"max_tokens": config.max_tokens, "temperature": config.temperature}
        if config.logprobs:
            self._options |= {"logprobs": True, "top_logprobs": 5}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._under_way: dict[str, asyncio.Task[float]] = {}
        """Requests for verdicts on `_loop`, by key."""
        self._counts: Counter[str] = Counter()
        """Verdicts since `metrics` was last called: all, `cached`, `shared` with another's request, `failed`."""

    # ------------------------------------------------------------------ verdicts
    async def verdict(self, question: str, ground_truth: str, answer: str, data_source: str = "unknown") -> float:
        """How sure the judge is, in [0, 1], that an answer says the same as the ground truth; right above 0.5.

        Args:
            question: The bare question.
            ground_truth: The right answer.
            answer: The given answer.
            data_source: Picks the prompt.

        Raises:
            JudgeError: No verdict within the tries and the time of the config.
        """
        config, loop = self.config, asyncio.get_running_loop()
        prompt = self._prompts[config.task_types.get(data_source, config.default_task_type)]
        settings = [GRAMMAR, config.model, prompt.version, config.temperature, config.extra_fields]
        key = cache_key([*settings, question, ground_truth, answer])
        self._counts["verdicts"] += 1
        if self._loop is not loop:
            self._loop, self._under_way = loop, {}
        task = self._under_way.get(key)
        if task is None:
            task = loop.create_task(self._find(key, prompt.fill(question, ground_truth, answer)))
            self._under_way[key] = task
            task.add_done_callback(lambda done: _forget(self._under_way, key, done))
        else:
            self._counts["shared"] += 1
        try:
            return await asyncio.shield(task)
        except EndpointError as error:
            self._counts["failed"] += 1
            raise JudgeError(str(error)) from error

    async def ask(self, prompt: str, max_tokens: int = 16) -> str:
        """The text of the model's reply to a prompt of a reward term; nothing is cached.

        Raises:
            JudgeError: No reply within the tries and the time of the config.
        """
        options = {"max_tokens": max_tokens, "temperature": self.config.temperature}
        try:
            return await self._client.chat([{"role": "user", "content": prompt}], options, read_text)
        except EndpointError as error:
            self._counts["failed"] += 1
            raise JudgeError(str(error)) from error

    async def _find(self, key: str, prompt: str) -> float:
        known = await self._cache.get(key)
        if known is not None:
            self._counts["cached"] += 1
            return known
        value = await self._client.chat([{"role": "user", "content": prompt}], self._options, read_verdict)
        await self._cache.put(key, value)
        return value

    # ------------------------------------------------------------------ life cycle
    def metrics(self) -> dict[str, float]:
        """Figures since the last call, always the same names: counts, fractions, seconds (0 without requests), tokens.

        `cost` is in the currency of the config's prices, 0 where they are 0.
        """
        counts, self._counts = self._counts, Counter()
        cost, spent, self._client.spent = self._client.cost, self._client.spent, Spent()
        latencies = sorted(spent.latencies_s) or [0.0]
        names = ("requests", "retries", "prompt_tokens", "completion_tokens")
        return {
            "verdicts": float(counts["verdicts"]),
            "failed": float(counts["failed"]),
            "cost": cost,
            **{name: float(getattr(spent, name)) for name in names},
            "cached_frac": counts["cached"] / max(1, counts["verdicts"]),
            "shared_frac": counts["shared"] / max(1, counts["verdicts"]),
            "latency_mean_s": sum(latencies) / len(latencies),
            "latency_p95_s": latencies[math.ceil(0.95 * len(latencies)) - 1],
            "latency_max_s": latencies[-1],
        }

    def close(self) -> None:
        """Close connections and cache. Not to be called on the event loop, which need not run any more."""
        loop, self._loop = self._loop, None
        if loop is not None and loop.is_running():
            asyncio.run_coroutine_threadsafe(self._shut(), loop).result(timeout=10)
        self._cache.close()

    async def _shut(self) -> None:
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()


def _forget(under_way: dict[str, asyncio.Task[float]], key: str, task: asyncio.Task[float]) -> None:
    under_way.pop(key, None)
    if not task.cancelled():
        task.exception()  # marks it as seen even where every caller was cancelled
