"""SGLang through its native `/generate`: ids in, ids and log-probabilities out, weights from an exported folder.

Trainer and server share the disk with that folder. Two folders alternate, because the server may still map the last.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import torch

from cv_lightning.distributed import gather_lists
from cv_lightning.engines.base import Completion, EngineConfig, Request, check_idle, check_weights, expanded
from cv_lightning.engines.remote import RemoteEngine
from cv_lightning.engines.sglang_server import (
    check_settings,
    check_tokenizer,
    check_version,
    probe_text,
    prompt_difference,
)
from cv_lightning.models.adapters.base import LOGIT_BAN, ModelAdapter
from cv_lightning.models.export import atomic_folder, write_config_and_processor, write_weights
from cv_lightning.models.lora import BASE, FACTORS
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
IDLE_S, IDLE_POLL_S = 120.0, 0.2
"""How long a weight update waits for the server to finish what was aborted, and how often it asks, in seconds."""


class SGLangEngine(RemoteEngine):
    """A policy that an SGLang server samples from; all ranks share the server."""

    def __init__(self, config: EngineConfig, adapter: ModelAdapter, model: PreTrainedModel) -> None:
        """Connect, and refuse a server that would answer other prompts than training sees.

        Args:
            config: `server`, `server.weights_folder` and `sleep` are used, and the limits.
            adapter: The policy's adapter.
            model: The policy, whose tensors reach the server whole and under their published names.

        Raises:
            EngineError: The server does not answer, is too old, has another tokenizer or lacks what `config` asks for.
        """
        super().__init__(config, adapter)
        self.model = model
        self.expected = _weight_names(model)
        self.folder = Path(self.server.weights_folder).absolute()
        self.root = httpx2.URL(self.server.base_url)
        self.sleeps = config.sleep == "always"
        self.asleep = False
        self.served_version = ""
        """Version that the server reports of the current weights; empty before the first update."""
        try:
            self._check_server()
        except EngineError:
            self.close()
            raise

    def _url(self, path: str) -> str:
        return str(self.root.join(path))

    def _check_server(self) -> None:
        info = self.get(self._url("/server_info")) or self.get(self._url("/get_server_info"))  # the older name
        if not isinstance(info, dict):
            raise EngineError(f"{self._url('/server_info')}: no such address. Is it an SGLang server?")
        check_version(info)
        model = self.get(self._url("/model_info")) or {}
        check_settings(info, model, self.max_model_len, sleeps=self.sleeps)
        text = probe_text(self.tokenizer)
        body = {"prompt": text, "add_special_tokens": False}
        check_tokenizer(self.tokenizer, text, self.ask(self.client.post(self._url("/tokenize"), body, _tokens)))
        if not info.get("enable_deterministic_inference") and _rank() == 0:
            logger.warning(
                "%s ignores the seeds of requests, so that no rollout can be repeated; training is not affected. On a "
                "GPU start the server with --enable-deterministic-inference to change that",
                self.server.base_url,
            )

    async def complete(self, request: Request) -> Completion:
        """See `RemoteEngine`."""
        sampling = {
            "max_new_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "sampling_seed": request.seed % 2**31,
            "stop_token_ids": [self.adapter.end_id],
            "skip_special_tokens": False,
            "logit_bias": {str(token): LOGIT_BAN for token in request.banned_ids},
        }
        body: dict[str, Any] = {"input_ids": list(request.prompt_ids), "sampling_params": sampling}
        body |= {"return_logprob": True, "logprob_start_len": -1, "return_prompt_token_ids": True}
        if request.images:
            body["image_data"] = await asyncio.to_thread(self.urls, request)
        answer = await self.client.post(self._url("/generate"), body, _generated)
        return self._read(request, answer)

    def _read(self, request: Request, answer: dict[str, Any]) -> Completion:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        if reason.get("type") not in ("stop", "length"):
            raise EngineError(f"SGLang ended request {request.id} by {reason.get('type')}: {reason.get('message', '')}")
        expected, given = expanded(request, self.adapter), answer["prompt_token_ids"]
        if given != expected:
            difference = prompt_difference(given, expected, self.adapter.image_id)
            raise EngineError(f"SGLang expanded request {request.id} to {difference}")
        served = meta.get("weight_version", self.served_version)
        if self.served_version and served != self.served_version:
            raise EngineError(
                f"SGLang answered request {request.id} with weights {served!r}, not {self.served_version!r} as it was "
                "given: it has been started again, or another run updates it"
            )
        logprobs, ids = zip(*((float(entry[0]), int(entry[1])) for entry in meta["output_token_logprobs"]), strict=True)
        return Completion(
            id=request.id,
            token_ids=list(ids),
            logprobs=list(logprobs),
            stopped=reason["type"] == "stop",
            prompt_ids=given,
        )

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Write a folder and make the server read it. All ranks call it, the first one writes. See `Engine`."""
        check_idle(self)

        def hand_over() -> None:
            try:
                self._hand_over(named_tensors, version)
            finally:
                deque(named_tensors, maxlen=0)  # gathering is a collective of all ranks, also after an error

        _on_first_rank(hand_over, others=lambda: deque(named_tensors, maxlen=0))
        self.policy_version, self.served_version, self.asleep = version, str(version), False

    def sleep(self) -> bool:
        """Make the server release its memory if `engine.sleep` is `always`. All ranks call it. See `Engine`."""
        if not self.sleeps or self.asleep:
            return self.asleep
        check_idle(self)
        gather_lists([0])  # SGLang stops if this comes while another rank's request runs

        def release() -> None:
            self._wait_until_idle()
            self._order("/release_memory_occupation")

        _on_first_rank(release)
        self.asleep = True
        return True

    def close(self) -> None:
        """Cancel all requests; a sleeping server allocates its memory again for the next run."""
        if self.asleep and _rank() == 0:
            with suppress(EngineError):
                self._order("/resume_memory_occupation")
        super().close()

    def _wait_until_idle(self) -> None:
        """Wait until the server is idle, and empty its key-value cache.

        A request whose connection is closed keeps running for some seconds. The server takes weights that arrive
        meanwhile, but reports the update as failed and keeps what it cached under the old weights.

        Raises:
            EngineError: The server is still busy after `IDLE_S` seconds.
        """
        deadline = time.monotonic() + IDLE_S
        while self.send("POST", self._url("/flush_cache")).status_code != 200:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self.server.base_url} is still working on requests after {IDLE_S:g} s, though this run waits "
                    "for none: does something else use the server?"
                )
            time.sleep(IDLE_POLL_S)

    def _order(self, path: str) -> None:
        self.ask(self.client.post(self._url(path), {}, lambda body: {"done": body}))  # it answers null

    def _hand_over(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        given: set[str] = set()

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in named_tensors:
                given.add(name)
                yield name, tensor

        target = self.folder / f"weights{version % 2}"
        with atomic_folder(target) as folder:
            write_weights(folder, noted(), self.model)
            check_weights(name for name in self.expected if name not in given)
            write_config_and_processor(folder, self.model, self.adapter)
        if self.asleep:
            self._order("/resume_memory_occupation")
        self._wait_until_idle()
        body = {"model_path": str(target), "flush_cache": True, "weight_version": str(version)}
        answer = self.ask(self.client.post(self._url("/update_weights_from_disk"), body, _success))
        if not answer["success"]:
            raise EngineError(f"SGLang cannot take the weights in {target}: {answer.get('message', '')}")


def _weight_names(model: PreTrainedModel) -> set[str]:
    """Names of the tensors of an update; a layer with LoRA factors has its merged weight."""
    names = (name for name, _ in model.named_parameters() if not any(mark in name for mark in FACTORS))
    return {name.replace(BASE, ".") for name in names}


def _rank() -> int:
    """Rank of this process in the run; 0 in a run of one process."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _on_first_rank(work: Callable[[], object], others: Callable[[], object] = lambda: None) -> None:
    """Run `work` on rank 0 and `others` on the other ranks.

    Raises:
        EngineError: `work` has failed; raised on all ranks.
    """
    error = ""
    try:
        work() if _rank() == 0 else others()
    except (EngineError, OSError) as caught:
        error = str(caught)
    if errors := [found for found in gather_lists([error]) if found]:
        raise EngineError(errors[0])


def _generated(body: Any) -> dict[str, Any] | None:
    """The answer to `/generate`, if it has what a completion needs."""
    meta = body.get("meta_info") if isinstance(body, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get("finish_reason"), dict):
        return None
    entries = meta.get("output_token_logprobs")
    if meta["finish_reason"].get("type") in ("stop", "length") and not (isinstance(entries, list) and entries):
        return None
    return body if isinstance(body.get("prompt_token_ids"), list) else None


def _tokens(body: Any) -> list[int] | None:
    """The ids in an answer of `/tokenize`."""
    tokens = body.get("tokens") if isinstance(body, dict) else None
    return tokens if isinstance(tokens, list) else None


def _success(body: Any) -> dict[str, Any] | None:
    return body if isinstance(body, dict) and "success" in body else None
