"""A playground with a scripted model, and the real agent loop, tokenizer and sandbox. Run it to serve the page."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from PIL import Image
from scripted_engine import ScriptedEngine

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.background import Background
from cv_lightning.engines import Completion, SamplingConfig
from cv_lightning.sandbox import Sandbox
from cv_lightning.viewer.playground.session import Playground
from cv_lightning.viewer.playground.turns import with_code

HOSTILE = "</script><img src=x onerror=document.title='owned'>"
TURN = with_code("<think>turned</think>", "result = image.rotate(90, expand=True)", 0)
ANSWER = f"<think>it reads {HOSTILE}</think><answer>42 {HOSTILE}</answer>"


class PatientEngine(ScriptedEngine):
    """Calls the tool on the first image, and answers on the second once the file `gate`, if any, exists."""

    def __init__(self, encoder: DialogueEncoder, seconds: float, gate: Path | None) -> None:
        super().__init__(encoder, lambda _, turn: ANSWER if len(self.requests[-1].images) > 1 else TURN)
        self.begun, self.seconds, self.gate = time.monotonic(), seconds, gate

    def step(self) -> list[Completion]:
        time.sleep(0.01)
        shut = self.gate is not None and len(self.requests[-1].images) > 1 and not self.gate.exists()
        if not self.pending or shut or time.monotonic() < self.begun + self.seconds:
            return []
        return super().step()


@contextmanager
def playground(
    encoder: DialogueEncoder, out: Path, seconds: float = 0.0, gate: Path | None = None
) -> Iterator[Playground]:
    background = Background("test-io")
    try:
        with Sandbox() as sandbox:
            engine = PatientEngine(encoder, seconds, gate)
            yield Playground(Rollout(engine, sandbox, encoder, background, AgentConfig(), ()), "scripted", out)
    finally:
        background.close()


if __name__ == "__main__":
    from cv_lightning.models.loading import PolicyConfig, load_adapter
    from cv_lightning.viewer.playground.examples import Example
    from cv_lightning.viewer.playground.web import serve

    checkpoint, store, port = sys.argv[1:]
    encoder = DialogueEncoder(load_adapter(PolicyConfig(path=checkpoint)))
    with playground(encoder, Path(store), gate=Path(store, "gate")) as served:
        tall = Example("tall", "How <b>tall</b>?", lambda: Image.new("RGB", (40, 80), "white"))
        serve(served, SamplingConfig(), int(port), examples=[tall])
