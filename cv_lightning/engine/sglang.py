"""SGLang behind its native `/generate`: ids in, ids and log-probabilities out, weights from an exported folder.

What the server reads is on a disk that both machines see. Two folders take turns, as the server may still be mapping
the last one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import torch

from cv_lightning.engine.base import Completion, EngineConfig, Request, check_idle, check_weights
from cv_lightning.engine.remote import RemoteEngine
from cv_lightning.model.export import whole_folder, write_companions, write_weights
from cv_lightning.model.lora import BASE, FACTORS
from cv_lightning.model.tokens import LOGIT_BAN
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class SGLangEngine(RemoteEngine):
    """A policy that an SGLang server samples from; all ranks share the server."""

    def __init__(self, config: EngineConfig, processor: ProcessorMixin, model: PreTrainedModel) -> None:
        """Look whether the server is there.

        Args:
            config: `server` says where, `server.weights_folder` how weights get there.
            processor: of the policy.
            model: the policy, whose tensors have to reach the server whole and under their published names.

        Raises:
            EngineError: nothing answers.
        """
        super().__init__(config, processor)
        self.model, self.processor = model, processor
        self.expected = _weight_names(model)
        self.folder = Path(self.server.weights_folder).absolute()
        self.root = httpx.URL(self.server.base_url)
        try:
            self.get(str(self.root.join("/get_model_info")))
        except EngineError:
            self.close()
            raise

    async def complete(self, request: Request) -> Completion:
        """See `RemoteEngine`."""
        sampling = {
            "max_new_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "sampling_seed": request.seed % 2**31,
            "stop_token_ids": [self.end_id],
            "skip_special_tokens": False,
            "logit_bias": {str(token): LOGIT_BAN for token in request.banned_ids},
        }
        body: dict[str, Any] = {"input_ids": list(request.prompt_ids), "sampling_params": sampling}
        body |= {"return_logprob": True, "logprob_start_len": -1}
        if request.images:
            body["image_data"] = await asyncio.to_thread(self.urls, request)
        answer = await self.client.post(str(self.root.join("/generate")), body, _meta_info)
        return self._read(request, answer)

    def _read(self, request: Request, meta: dict[str, Any]) -> Completion:
        reason = meta["finish_reason"]
        if reason.get("type") not in ("stop", "length"):
            raise EngineError(f"SGLang ended request {request.id} by {reason.get('type')}: {reason.get('message', '')}")
        expected = self.num_prompt_tokens(request)
        if meta["prompt_tokens"] != expected:
            raise EngineError(
                f"SGLang expanded request {request.id} to {meta['prompt_tokens']} tokens, training to {expected}: it "
                "resizes images otherwise, or has tokenised the prompt anew"
            )
        logprobs, ids = zip(*((float(entry[0]), int(entry[1])) for entry in meta["output_token_logprobs"]), strict=True)
        return Completion(
            id=request.id,
            token_ids=list(ids),
            logprobs=list(logprobs),
            stopped=reason["type"] == "stop",
            prompt_ids=None,
        )

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Write a folder and have the server read it; all ranks call it, the first one writes. See `Engine`."""
        check_idle(self)
        error = ""
        if _rank() == 0:
            try:
                self._hand_over(named_tensors, version)
            except (EngineError, OSError) as caught:
                error = str(caught)
        for _ in named_tensors:  # every rank takes part in gathering (trap T37), also after an error
            pass
        if error := _same_on_all_ranks(error):
            raise EngineError(error)
        self.weight_version = version

    def _hand_over(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        given: set[str] = set()

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in named_tensors:
                given.add(name)
                yield name, tensor

        target = self.folder / f"weights{version % 2}"
        with whole_folder(target) as folder:
            write_weights(folder, noted(), self.model)
            check_weights(name for name in self.expected if name not in given)
            write_companions(folder, self.model, self.processor, str(self.processor.chat_template or ""))
        body = {"model_path": str(target), "flush_cache": True, "weight_version": str(version)}
        answer = self.ask(self.client.post(str(self.root.join("/update_weights_from_disk")), body, _success))
        if not answer["success"]:
            raise EngineError(f"SGLang cannot take the weights in {target}: {answer.get('message', '')}")


def _weight_names(model: PreTrainedModel) -> set[str]:
    """Names of what an update brings: of a layer with an adapter its merged weight."""
    names = (name for name, _ in model.named_parameters() if not any(mark in name for mark in FACTORS))
    return {name.replace(BASE, ".") for name in names}


def _rank() -> int:
    """Of this process in the run; 0 in a run of one."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _same_on_all_ranks(error: str) -> str:
    """Rank 0's message, on all ranks."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return error
    told = [error]
    distributed.broadcast_object_list(told)
    return told[0]


def _meta_info(body: Any) -> dict[str, Any] | None:
    """`meta_info` of an answer, if it has what a completion needs."""
    meta = body.get("meta_info") if isinstance(body, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get("finish_reason"), dict):
        return None
    entries = meta.get("output_token_logprobs")
    if meta["finish_reason"].get("type") in ("stop", "length") and not (isinstance(entries, list) and entries):
        return None
    return meta if isinstance(meta.get("prompt_tokens"), int) else None


def _success(body: Any) -> dict[str, Any] | None:
    return body if isinstance(body, dict) and "success" in body else None
