"""SGLang behind its native `/generate`: ids in, ids and log-probabilities out, weights from an exported folder.

What the server reads is on a disk that both machines see. Two folders take turns, as the server may still be mapping
the last one.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from cv_lightning.engine.base import Completion, EngineConfig, Request, check_idle
from cv_lightning.engine.remote import RemoteEngine
from cv_lightning.model.tokens import LOGIT_BAN
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin

SHARD_BYTES = 4_000_000_000
"""Of one weights file; what is collected in memory before it is written."""


class SGLangEngine(RemoteEngine):
    """A policy that an SGLang server samples from. Only rank 0 may give it weights."""

    def __init__(self, config: EngineConfig, processor: ProcessorMixin, path: str) -> None:
        """Look whether the server is there.

        Args:
            config: `server` says where, `server.weights_folder` how weights get there.
            processor: of the policy.
            path: Hugging Face folder of the policy, whose config files are copied next to new weights.

        Raises:
            EngineError: nothing answers.
        """
        super().__init__(config, processor)
        self.path = Path(path)
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
        body |= {"return_logprob": True, "logprob_start_len": -1, "rid": f"{request.id}@{self.weight_version}"}
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
        """Write a folder and have the server read it. See `Engine`."""
        check_idle(self)
        folder = self.folder / f"weights{version % 2}"
        write_weights(folder, named_tensors, self.path)
        body = {"model_path": str(folder), "flush_cache": True, "weight_version": str(version)}
        answer = self.ask(self.client.post(str(self.root.join("/update_weights_from_disk")), body, _success))
        if not answer["success"]:
            raise EngineError(f"SGLang cannot take the weights in {folder}: {answer.get('message', '')}")
        self.weight_version = version


def write_weights(folder: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], path: Path) -> None:
    """Write tensors as a Hugging Face folder, whole or not at all.

    Args:
        folder: to be replaced.
        named_tensors: exhausted; tensors of one storage are written under their first name only.
        path: folder whose config, tokenizer and processor files are copied.
    """
    from huggingface_hub import save_torch_state_dict

    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in path.iterdir():
        if file.is_file() and "safetensors" not in file.name and not file.name.endswith(".bin"):
            shutil.copy2(file, temporary / file.name)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in named_tensors}
    save_torch_state_dict(tensors, temporary, max_shard_size=SHARD_BYTES)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


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
