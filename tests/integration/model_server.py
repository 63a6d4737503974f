"""The tiny model behind HTTP, as an OpenAI-compatible server and as SGLang: real sampling, the real protocols.

Field names, types and refusals are those of SGLang 0.5.23 (`/generate`, `/update_weights_from_disk`, `/server_info`)
and OpenAI's (`/v1/chat/completions`, `/v1/models`). Behind them is the transformers engine with a model of its own.
The faults of real SGLang servers can be switched on.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from embedding_cache import EmbeddingCache
from engine_samples import Policy
from PIL import Image

from cv_lightning.engines.base import Completion, EngineConfig, Request
from cv_lightning.engines.hf import TransformersEngine
from cv_lightning.types import CVLightningError

SAMPLING = {
    *("max_new_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "ignore_eos", "n"),
    *("skip_special_tokens", "logit_bias", "sampling_seed", "frequency_penalty", "presence_penalty"),
}
"""Sampling parameters that SGLang knows; it refuses others."""
BIAS_THAT_BANS = -50.0


class Refused(Exception):
    """Answered with HTTP 400."""


class Broken(Exception):
    """Parameters that end the scheduler of a real server; answered with HTTP 500."""


class ModelServer:
    """`with ModelServer(path) as server`: serves the model of a folder at `server.url`."""

    def __init__(self, path: Path, name: str = "tiny", keeps_embeddings: bool = False) -> None:
        self.policy, self.name = Policy.load(path), name
        if keeps_embeddings:  # as a server started without SGLANG_VLM_CACHE_SIZE_MB=0 does
            EmbeddingCache(self.policy.model).__enter__()
        sizes = EngineConfig(kind="transformers", max_model_len=512, max_num_seqs=32, max_images=4)
        self.engine = TransformersEngine(self.policy.model, self.policy.adapter, sizes)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.misbehave: Callable[[int, str], int] = lambda number, path: 0
        """HTTP status that request `number` (of POST ones, from 0) is answered with; 0: as it should be."""
        self.posts: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/generate": self.generate,
            "/update_weights_from_disk": self.update_weights_from_disk,
            "/tokenize": self.tokenize,
            "/flush_cache": self.flush_cache,
            "/release_memory_occupation": lambda body: self.memory(released=True),
            "/resume_memory_occupation": lambda body: self.memory(released=False),
            "/v1/chat/completions": self.chat_completions,
        }
        self.resizes = False
        """Halve every image of SGLang's `/generate`, as a server with other pixel limits would."""
        self.rewrites_prompts = False
        """Tokenise prompts with images again, as SGLang below 0.5.13 does."""
        self.tokenizer = self.policy.adapter.tokenizer
        """Another checkpoint's: images are not found in a prompt, and it is answered without them."""
        self.lag_s = 0.0
        """How long `/generate` keeps the scheduler busy before it answers, whether or not anybody still listens."""
        self.info: dict[str, Any] = {
            "version": "0.5.23",
            "context_length": 4096,
            "device": "cpu",
            "enable_deterministic_inference": True,
            "enable_memory_saver": False,
            "preferred_sampling_params": None,
            "skip_tokenizer_init": False,
        }
        """`/server_info`. Seeds are ignored without `enable_deterministic_inference`."""
        self.memory_released = False
        self.weight_version = "default"
        self._busy = 0
        self._numbers = itertools.count()
        self._waiting: queue.SimpleQueue[tuple[Request, Future[Completion]] | Callable[[], None] | None]
        self._waiting = queue.SimpleQueue()

    # ------------------------------------------------------------------ life cycle
    def __enter__(self) -> ModelServer:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.http.daemon_threads = True
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.http.serve_forever, self._run)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.shutdown()
        self.http.server_close()
        self._waiting.put(None)
        for thread in self.threads:
            thread.join(10)

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def _run(self) -> None:
        """The one thread that owns the model: what has come meanwhile is a batch."""
        futures: dict[str, Future[Completion]] = {}
        while (item := self._waiting.get()) is not None:
            items = [item]
            while not self._waiting.empty():
                items.append(self._waiting.get())
            for entry in items:
                if callable(entry):
                    entry()
                elif entry is not None:
                    request, future = entry
                    futures[request.id] = future
                    try:
                        self.engine.add_request(request)
                    except CVLightningError as error:
                        futures.pop(request.id).set_exception(Refused(str(error)))
            while self.engine.has_unfinished():
                for done in self.engine.step():
                    futures.pop(done.id).set_result(done)
            if None in items:
                return

    def _sample(self, ids: list[int], images: list[Image.Image], **sampling: Any) -> Completion:
        future: Future[Completion] = Future()
        request = Request(
            id=str(next(self._numbers)),
            prompt_ids=ids,
            images=images,
            **sampling,
        )
        self._waiting.put((request, future))
        return future.result(timeout=120)

    # ------------------------------------------------------------------ SGLang
    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        self._busy += 1
        try:
            time.sleep(self.lag_s)
            return self._generate(body)
        finally:
            self._busy -= 1

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body.get("sampling_params", {})
        if unknown := set(given) - SAMPLING:
            raise Refused(f"Unexpected keyword argument {sorted(unknown)}")
        bias = given.get("logit_bias", {})
        images = [picture(url) for url in body.get("image_data") or []]
        if self.resizes:
            images = [image.resize((image.width // 2, image.height // 2)) for image in images]
        ids = body["input_ids"]
        image_id = self.tokenizer.convert_tokens_to_ids(self.policy.adapter.image_token)
        if image_id not in ids:
            images = []
        if self.rewrites_prompts and images:
            ids = self.tokenizer(self.tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
        seeds = self.info["enable_deterministic_inference"]
        done = self._sample(
            ids,
            [self.policy.encoder.model_image(image) for image in images],
            max_tokens=given.get("max_new_tokens", 128),
            temperature=given.get("temperature", 1.0),
            top_p=given.get("top_p", 1.0),
            seed=given.get("sampling_seed") or 0 if seeds else next(self._numbers),
            banned_ids=[int(token) for token, value in bias.items() if value < BIAS_THAT_BANS],
        )
        stop = {"type": "stop", "matched": done.token_ids[-1]}
        meta: dict[str, Any] = {
            "id": body.get("rid", ""),
            "finish_reason": stop if done.stopped else {"type": "length", "length": len(done.token_ids)},
            "prompt_tokens": len(done.prompt_ids or []),
            "completion_tokens": len(done.token_ids),
            "weight_version": self.weight_version,
        }
        if body.get("return_logprob"):
            pairs = zip(done.logprobs or [], done.token_ids, strict=True)
            meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in pairs]
        answer = {"text": self.tokenizer.decode(done.token_ids), "output_ids": done.token_ids, "meta_info": meta}
        return answer | ({"prompt_token_ids": done.prompt_ids} if body.get("return_prompt_token_ids") else {})

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
        return {"tokens": ids, "count": len(ids), "max_model_len": self.info["context_length"]}

    def flush_cache(self, body: dict[str, Any]) -> str:
        if self._busy:
            raise Refused("Flush cache failed.")
        return "Cache flushed."

    def memory(self, released: bool) -> None:
        if self.memory_released == released or self._busy:
            raise Broken  # both end SGLang's scheduler
        self.memory_released = released

    def update_weights_from_disk(self, body: dict[str, Any]) -> dict[str, Any]:
        loaded: Future[None] = Future()

        def load() -> None:
            try:
                new = Policy.load(Path(body["model_path"]))
                self.engine.update_weights(new.model.named_parameters(), version=0)
                loaded.set_result(None)
            except CVLightningError as error:
                loaded.set_exception(Refused(f"Failed to update weights: {error}"))

        if self.memory_released:
            raise Broken
        busy = self._busy > 0
        self._waiting.put(load)
        loaded.result(timeout=120)
        self.weight_version = body.get("weight_version") or "default"
        if busy:
            raise Refused("Weights were updated, but the cache was not flushed because requests are still running.")
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    # ------------------------------------------------------------------ OpenAI
    def chat_completions(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["model"] != self.name:
            raise Refused(f"The model `{body['model']}` does not exist.")
        images: list[Image.Image] = []
        messages = []
        for message in body["messages"]:
            parts = message["content"]
            if isinstance(parts, list):
                images += [picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
                parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            messages.append({"role": message["role"], "content": parts})
        seen = [self.policy.encoder.model_image(image) for image in images]
        done = self._sample(
            list(self.policy.encoder.prompt_ids(messages)),
            seen,
            max_tokens=body.get("max_tokens", 16),
            temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0),
            seed=body.get("seed", 0),
            banned_ids=self.policy.banned,
        )
        text = self.policy.encoder.decode(done.token_ids)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        return {
            "object": "chat.completion",
            "model": self.name,
            "choices": [choice | {"finish_reason": "stop" if done.stopped else "length"}],
            "usage": {"prompt_tokens": len(done.prompt_ids or []), "completion_tokens": len(done.token_ids)},
        }


def picture(url: str) -> Image.Image:
    """The image of a data address."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def _handler_of(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    gets: dict[str, Callable[[], Any]] = {
        "/model_info": lambda: {
            "model_path": str(server.policy.path),
            "weight_version": server.weight_version,
            "has_image_understanding": True,
        },
        "/server_info": lambda: server.info,
        "/v1/models": lambda: {"object": "list", "data": [{"id": server.name, "object": "model"}]},
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = gets.get(self.path)
            self._answer(404, {}) if answer is None else self._answer(200, answer())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            number = len(server.requests)
            server.requests.append((self.path, body))
            if status := server.misbehave(number, self.path):
                return self._answer(status, {"error": {"message": "as the test wants it"}})
            if self.path not in server.posts:
                return self._answer(404, {})
            try:
                self._answer(200, server.posts[self.path](body))
            except Refused as error:
                self._answer(400, {"error": {"message": str(error)}})
            except Broken:
                self._answer(500, {"error": {"message": "scheduler hit an exception"}})

        def _answer(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    return Handler
