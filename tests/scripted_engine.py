"""An engine that says what a test wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.engines.base import Completion, Request


class ScriptedEngine:
    """Answers every request with the script's next text for its task."""

    def __init__(self, encoder: DialogueEncoder, script: Callable[[str, int], str], max_model_len: int = 2048) -> None:
        self.encoder, self.script, self.max_model_len = encoder, script, max_model_len
        self.policy_version = 7
        self.requests: list[Request] = []
        self.pending: list[Request] = []

    def add_request(self, request: Request) -> None:
        self.requests.append(request)
        self.pending.append(request)

    def step(self) -> list[Completion]:
        request = self.pending.pop(0)
        turn = sum(r.id == request.id for r in self.requests) - 1
        ids = list(self.encoder.assistant_ids(self.script(request.id, turn)))
        stopped = len(ids) <= request.max_tokens
        ids = ids[: request.max_tokens]
        expanded, sizes = [], iter([image.size for image in request.images])
        for token in request.prompt_ids:
            pad = token == self.encoder.image_pad_id
            expanded += [token] * self.encoder.num_image_tokens(next(sizes)) if pad else [token]
        return [
            Completion(id=request.id, token_ids=ids, logprobs=[-0.5] * len(ids), stopped=stopped, prompt_ids=expanded)
        ]

    def has_unfinished(self) -> bool:
        return bool(self.pending)

    def abort(self, ids: Sequence[str]) -> None:
        self.pending = [r for r in self.pending if r.id not in set(ids)]

    def update_weights(self, named_tensors: Iterable[tuple[str, object]], version: int) -> None:
        self.policy_version = version

    def sleep(self) -> bool:
        return False

    def close(self) -> None:
        self.pending.clear()
