"""Start-up checks of an SGLang server: version, settings and tokenizer must fit the run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cv_lightning.types import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OLDEST = (0, 5, 13)
"""Oldest supported version. Older ones tokenise prompts with images again; 0.5.3 to 0.5.5 also resize every image."""
PROBED_ENTRIES = 1000
"""Number of vocabulary entries in the text that both tokenizers read."""


def check_version(info: Mapping[str, Any]) -> None:
    """Refuse a server that changes prompts.

    Args:
        info: The server's `/server_info`.

    Raises:
        EngineError: It is older than `OLDEST`, or reports no version.
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(info.get("version", "")))
    if found is None:
        raise EngineError(
            f"/server_info names no version of SGLang but {info.get('version')!r}: is it an SGLang server?"
        )
    version = tuple(int(number) for number in found.groups())
    if version == (0, 0, 0):  # built from source without tags; every answer is checked anyway
        return
    if version < OLDEST:
        raise EngineError(
            f"the server runs SGLang {info['version']}, which tokenises prompts with images again and so answers other "
            f"prompts than are trained on: install sglang>={'.'.join(map(str, OLDEST))}"
        )


def check_settings(info: Mapping[str, Any], model: Mapping[str, Any], max_model_len: int, *, sleeps: bool) -> None:
    """Refuse a server that cannot take the run's prompts, or would sample differently.

    Args:
        info: The server's `/server_info`.
        model: Its `/model_info`.
        max_model_len: `engine.max_model_len`.
        sleeps: True if `engine.sleep` is `always`.

    Raises:
        EngineError: A setting does not fit; the message names it.
    """
    length = info.get("context_length")
    if isinstance(length, int) and length < max_model_len:
        raise EngineError(
            f"engine.max_model_len {max_model_len} is more than the server's context length {length}: lower it, or "
            f"start the server with --context-length {max_model_len}"
        )
    if model.get("has_image_understanding") is False:
        raise EngineError(
            f"the server takes no images for {model.get('model_path')}: start it on the policy's folder, without "
            "--language-only, and with --enable-multimodal if the model needs it"
        )
    if info.get("skip_tokenizer_init"):
        raise EngineError("the server has no tokenizer and would drop images: start it without --skip-tokenizer-init")
    if info.get("preferred_sampling_params"):
        raise EngineError(
            f"the server samples with {info['preferred_sampling_params']}, which training knows nothing of: start it "
            "without --preferred-sampling-params"
        )
    if sleeps and info.get("device") != "cpu" and not info.get("enable_memory_saver"):
        raise EngineError(
            "engine.sleep always: the server would give no memory back. Start it with --enable-memory-saver, or set "
            "engine.sleep to auto"
        )


def probe_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text that distinguishes tokenizers: every added token, and entries spread over the whole vocabulary."""
    size = len(tokenizer)
    spread = (tokenizer.decode([token]) for token in range(0, size, max(1, size // PROBED_ENTRIES)))
    added = sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().__getitem__)
    return "".join([*added, *(f"{piece}\n" for piece in spread if "\ufffd" not in piece)])


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> None:
    """Refuse a server with another tokenizer: it would find no image in the prompt and answer without it.

    Args:
        tokenizer: The policy's tokenizer.
        text: The text that both tokenizers have read.
        ids: Ids from the server's tokenizer.

    Raises:
        EngineError: The ids differ; the message names the first difference.
    """
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if own == list(ids):
        return
    first = next((k for k, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), min(len(own), len(ids)))
    there = ids[first] if first < len(ids) else "nothing"
    here = f"{own[first]} ({tokenizer.convert_ids_to_tokens(own[first])!r})" if first < len(own) else "nothing"
    raise EngineError(
        f"the server's tokenizer is not the policy's: token {first} of the probe is {there} there and {here} here. "
        "Start the server on the policy's folder (--model-path policy.path, no other --tokenizer-path)"
    )


def prompt_difference(given: Sequence[int], expected: Sequence[int], image_id: int) -> str:
    """Describe how the server's prompt differs from training's, and the likely cause.

    Args:
        given: The server's ids, images expanded.
        expected: Training's ids.
        image_id: Id of an image token.
    """
    images, wanted = list(given).count(image_id), list(expected).count(image_id)
    if images != wanted:
        return (
            f"{images} image tokens, training {wanted}: it resizes images otherwise, or drops them. Start it on a "
            "folder with the policy's pixel limits (policy.min_pixels, policy.max_pixels)"
        )
    first = next((k for k, (a, b) in enumerate(zip(given, expected, strict=False)) if a != b), len(expected))
    return f"{len(given)} tokens, training {len(expected)}, which differ from token {first} on: it tokenises text again"
