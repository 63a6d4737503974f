"""Address and request limits of a served model. Imports nothing heavy."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from cv_lightning.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, check_ranges


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A model behind an OpenAI-compatible endpoint."""

    flag: ClassVar[str] = "endpoint"
    """Name of the config on the command line."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Address; chats are posted to `<base_url>/chat/completions`."""
    model: str = ""
    """Name under which the endpoint serves the model."""
    api_key_env: str = "ENDPOINT_API_KEY"
    """Environment variable that holds the key; unset means no key. The key itself is never part of a config."""
    max_parallel: PositiveInt = 64
    """Requests under way at once, at least 1."""
    requests_per_s: NonNegativeFloat = 0.0
    """Rate limit; 0 means none."""
    timeout_s: PositiveFloat = 120.0
    """Seconds that one request may take in all, however slowly its bytes arrive."""
    give_up_s: PositiveFloat = 600.0
    """Seconds that one answer may take with all its attempts and pauses, from its first request on. Requests that wait
    for a server that has been down for this long fail at once."""
    max_attempts: PositiveInt = 4
    """Attempts per answer. HTTP 429 does not count as one: the server asks for a slower pace."""
    max_backoff_s: PositiveFloat = 20.0
    """Limit on a server's Retry-After in seconds; after other failures the openai library waits 0.5 to 8 s."""
    breaker_failures: PositiveInt = 16
    """Failures in a row after which nothing is sent for `breaker_pause_s`."""
    breaker_pause_s: PositiveFloat = 10.0
    """Seconds for which the circuit stays open before one request probes the server."""
    extra_fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of each chat, such as `chat_template_kwargs: {enable_thinking: false}`; no API keys."""

    price_per_million_prompt_tokens: NonNegativeFloat = 0.0
    """Price for the reported cost, in any currency."""
    price_per_million_completion_tokens: NonNegativeFloat = 0.0
    """Price for the reported cost, in any currency."""

    def __post_init__(self) -> None:
        flag = self.flag
        check_ranges(self, flag)
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https"):
            raise ValueError(f"{flag}.base_url {self.base_url!r} must begin with http:// or https://")
        for part, kind in ((url.username or url.password, "user or password"), (url.query or url.fragment, "query")):
            if part:
                raise ValueError(f"{flag}.base_url must not hold a {kind}; name the key's variable in api_key_env")
        if not self.api_key_env.isidentifier():
            # The value is not shown: a key that was put here by mistake would be in every log.
            raise ValueError(
                f"{flag}.api_key_env is not the name of an environment variable; never put the key itself there"
            )
        if taken := {"model", "messages"} & set(self.extra_fields):
            raise ValueError(f"{flag}.extra_fields must not hold {sorted(taken)}: the client fills them")

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Cost of tokens, in the currency of the config's prices."""
        prices = self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens
        return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6


@dataclass(slots=True)
class Spent:
    """Counts of an endpoint's requests and tokens."""

    requests: int = 0
    retries: int = 0
    failed: int = 0
    """Questions without an answer."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    """Latencies of the last successful requests."""
