"""Where a served model is and how hard it may be asked. No heavy imports."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A model behind an OpenAI-compatible endpoint."""

    flag: ClassVar[str] = "endpoint"
    """What the config is called on the command line."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Endpoint; chats go to `<base_url>/chat/completions`."""
    model: str = ""
    """Name under which the endpoint serves the model."""
    api_key_env: str = "ENDPOINT_API_KEY"
    """Environment variable that holds the key; unset means no key. The key itself is never part of a config."""
    max_parallel: int = 64
    """Requests under way at once."""
    requests_per_s: float = 0.0
    """Rate limit; 0: none."""
    timeout_s: float = 120.0
    """Most seconds that one request may take as a whole, however slowly its bytes drip."""
    give_up_s: float = 600.0
    """Most seconds that an answer may take with all its tries and pauses once it is its turn. A server that has been
    down for so long fails waiting questions at once."""
    max_attempts: int = 4
    """Failed tries per answer, the first one included. HTTP 429 is no failure: the server asks for a slower pace."""
    max_backoff_s: float = 20.0
    """A server's Retry-After is honoured up to this; after other failures the openai library waits 0.5 to 8 s."""
    breaker_failures: int = 16
    """Failures in a row after which nothing is sent for `breaker_pause_s`."""
    breaker_pause_s: float = 10.0
    """How long the circuit stays open before one request tries again."""
    extra_fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of each chat, such as `chat_template_kwargs: {enable_thinking: false}`. No place for keys."""

    price_per_million_prompt_tokens: float = 0.0
    """For the cost that is told; any currency."""
    price_per_million_completion_tokens: float = 0.0
    """For the cost that is told; any currency."""

    def __post_init__(self) -> None:
        flag = self.flag
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"{flag}.base_url {self.base_url!r} must begin with http:// or https://")
        if "@" in self.base_url.split("//", 1)[1].split("/", 1)[0]:
            raise ValueError(
                f"{flag}.base_url must not hold a user or password; name the key's variable in api_key_env"
            )
        if "?" in self.base_url or "#" in self.base_url:
            raise ValueError(f"{flag}.base_url must not hold a query; name the key's variable in api_key_env")
        if not self.api_key_env.isidentifier():
            # the value is not shown: whoever puts a key here would find it in every log
            raise ValueError(
                f"{flag}.api_key_env is no name of an environment variable; never put the key itself there"
            )
        if taken := {"model", "messages"} & set(self.extra_fields):
            raise ValueError(f"{flag}.extra_fields must not hold {sorted(taken)}: the client fills them")
        self.require(("max_parallel", "max_attempts", "breaker_failures"), at_least=1)
        self.require(("timeout_s", "give_up_s", "max_backoff_s", "breaker_pause_s"), above=0)
        prices = ("price_per_million_prompt_tokens", "price_per_million_completion_tokens")
        self.require(("requests_per_s", *prices), at_least=0)

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Price of so many tokens, in the currency of the config's prices."""
        prices = self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens
        return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6

    def require(self, names: tuple[str, ...], *, at_least: float | None = None, above: float | None = None) -> None:
        """Check numbers.

        Args:
            names: of fields.
            at_least: least allowed value.
            above: largest value that is not allowed any more.

        Raises:
            ValueError: names the field that is out of range.
        """
        for name in names:
            value = getattr(self, name)
            if at_least is not None and not value >= at_least:
                raise ValueError(f"{self.flag}.{name} is {value}; it must be at least {at_least:g}")
            if above is not None and not value > above:
                raise ValueError(f"{self.flag}.{name} is {value}; it must be above {above:g}")


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
