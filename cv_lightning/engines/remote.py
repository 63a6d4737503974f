"""Base of engines behind HTTP: requests run on a background thread, and `step` returns those that are finished.

A failed request is a `Completion` with an error, which ends its own trajectory and no other.
"""

from __future__ import annotations

import logging
import queue
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import httpx2

from cv_lightning.background import Background
from cv_lightning.endpoint.client import EndpointClient, is_local
from cv_lightning.endpoint.messages import data_url
from cv_lightning.engines.base import Completion, EngineConfig, Request, check_length, failed
from cv_lightning.images import content_hash
from cv_lightning.types import EndpointError, EngineError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from cv_lightning.models.adapters import ModelAdapter

logger = logging.getLogger(__name__)

STEP_S = 0.05
"""Time in seconds that a step waits for an answer, and so may delay a tool result."""
KEPT_IMAGES = 256
"""Maximum number of encoded images that are kept, of some MB each."""


class RemoteEngine(ABC):
    """An engine that a server runs."""

    def __init__(self, config: EngineConfig, adapter: ModelAdapter) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            config: `server`, `max_model_len` and `max_images` are used.
            adapter: Adapter of the served model: its tokenizer, and the sizes of its images.
        """
        self.server = server = config.server_config
        self.max_model_len, self.max_images = config.max_model_len, config.max_images
        self.policy_version = -1
        self.adapter, self.tokenizer = adapter, adapter.tokenizer
        self.client = EndpointClient(server, "completion")
        self.background = Background("cv-lightning-server")
        self.under_way: dict[str, Future[Completion]] = {}
        self._done: queue.SimpleQueue[tuple[str, Future[Completion]]] = queue.SimpleQueue()
        self._urls: dict[str, str] = {}

    @abstractmethod
    async def complete(self, request: Request) -> Completion:
        """Send a request to the server and read its answer.

        Raises:
            EndpointError: The server gave no completion.
            EngineError: The server's completion cannot be used.
        """

    # ------------------------------------------------------------------ the engine protocol
    def add_request(self, request: Request) -> None:
        """Send a request; see `Engine`."""
        check_length(request, self.adapter.image_rule, self.max_model_len, self.max_images)
        future = self.background.submit(self.complete(request))
        self.under_way[request.id] = future
        future.add_done_callback(lambda finished: self._done.put((request.id, finished)))

    def step(self) -> list[Completion]:
        """Return requests that were answered since the last step; wait up to `STEP_S` for the first."""
        found: list[Completion] = []
        try:
            while self.under_way:
                name, future = self._done.get_nowait() if found else self._done.get(timeout=STEP_S)
                if self.under_way.get(name) is future:  # else it was aborted meanwhile
                    del self.under_way[name]
                    found.append(_completion(name, future))
        except queue.Empty:
            pass
        return found

    def has_unfinished(self) -> bool:
        """True while any request is under way."""
        return bool(self.under_way)

    def abort(self, ids: Sequence[str]) -> None:
        """Cancel requests; a server that notices a closed connection stops working on them."""
        for name in ids:
            future = self.under_way.pop(name, None)
            if future is not None:
                future.cancel()

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Refused: the server keeps its own weights."""
        raise EngineError(
            f"the server at {self.server.base_url} takes no weights from a trainer; train with engine.kind vllm, "
            "transformers or sglang"
        )

    def sleep(self) -> bool:
        """Return False: the memory is the server's."""
        return False

    def close(self) -> None:
        """Cancel all requests and log how many there were."""
        self.abort(list(self.under_way))
        if self.background.loop.is_running():
            self.background.submit(self.client.aclose()).result(timeout=10)
        self.background.close()
        spent = self.client.spent
        logger.info(
            "%s: %d requests, %d of them repeated, %d without an answer; %d + %d tokens, cost %.2f",
            self.server.base_url,
            spent.requests,
            spent.retries,
            spent.failed,
            spent.prompt_tokens,
            spent.completion_tokens,
            self.client.cost,
        )

    # ------------------------------------------------------------------ for subclasses
    def ask(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine of the client on the background thread and wait for its result.

        Raises:
            EngineError: The server refused it or gave no answer.
        """
        try:
            return self.background.submit(work).result()
        except EndpointError as error:
            raise EngineError(str(error)) from error

    def get(self, url: str) -> Any:
        """JSON from an address of the server, without retries; None if the address does not exist.

        Raises:
            EngineError: The server does not answer, or refuses.
        """
        response = self.send("GET", url)
        if response.status_code in (404, 405):
            return None
        try:
            response.raise_for_status()
            return response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise EngineError(self._no_answer(url, error)) from error

    def send(self, method: str, url: str) -> httpx2.Response:
        """The server's response to a request without a body, whatever its status, without retries.

        Raises:
            EngineError: The server does not answer.
        """
        key = self.client.key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with httpx2.Client(trust_env=not is_local(url), timeout=self.server.timeout_s, headers=headers) as http:
                return http.request(method, url)
        except httpx2.HTTPError as error:
            raise EngineError(self._no_answer(url, error)) from error

    def _no_answer(self, url: str, error: Exception) -> str:
        return f"{url}: {error}. Is the server up, and is {self.server.flag}.base_url its address?"

    def urls(self, request: Request) -> list[str]:
        """The images of a request as lossless `data:` addresses; each is encoded once."""
        return list(map(self._url_of, request.images))

    def _url_of(self, image: Image.Image) -> str:
        name = content_hash(image)
        url = self._urls.pop(name, "") or data_url(image)
        self._urls[name] = url  # the latest used is the last
        if len(self._urls) > KEPT_IMAGES:
            del self._urls[next(iter(self._urls))]
        return url


def _completion(name: str, future: Future[Completion]) -> Completion:
    error = None if future.cancelled() else future.exception()
    if future.cancelled():
        error = EngineError("the request was cancelled")
    if error is None:
        return future.result()
    if not isinstance(error, (EndpointError, EngineError)):
        raise error
    return failed(name, str(error))
