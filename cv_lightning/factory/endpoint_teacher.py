"""A teacher behind any OpenAI-compatible endpoint, which writes whole turns."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from cv_lightning.endpoint.client import EndpointClient, usage
from cv_lightning.endpoint.config import EndpointConfig
from cv_lightning.endpoint.messages import image_part, reply_text, text_part
from cv_lightning.factory import phrases
from cv_lightning.factory.phrases import RETURNED
from cv_lightning.factory.plans import RETURNS
from cv_lightning.factory.teacher import TurnRequest, Written, crop_arguments
from cv_lightning.images import fit_to_pixels
from cv_lightning.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt

PROMPT_FILE = Path(__file__).parent / "prompts" / "teacher.md"


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(EndpointConfig):
    """A vision-language model behind an OpenAI-compatible endpoint that writes assistant turns."""

    flag: ClassVar[str] = "--teacher"

    model: str = "Qwen/Qwen3-VL-235B-A22B-Instruct"
    """Name under which the endpoint serves the model."""
    api_key_env: str = "TEACHER_API_KEY"
    """Environment variable that holds the key; unset means no key. The key itself is never part of a config."""
    tries: PositiveInt = 3
    """Attempts at a turn, each told why the last was refused, before its conversation is dropped."""
    prompt_file: str = ""
    """File with the teacher's system prompt; empty: the shipped one."""
    image_pixels: NonNegativeInt = 1_000_000
    """Largest number of pixels of an image sent, as JPEG; larger images are reduced. 0 sends no images."""
    max_parallel: PositiveInt = 16
    """Largest number of requests at the same time."""
    breaker_failures: PositiveInt = 8
    """Successive failures after which no request is sent for `breaker_pause_s`."""
    max_tokens: PositiveInt = 1024
    """Largest number of tokens of a turn."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_file and not Path(self.prompt_file).is_file():
            raise ValueError(f"--teacher.prompt_file {self.prompt_file}: no such file")


class EndpointTeacher:
    """Requests every turn from a model, with the images so far and a directive that states what the turn must do."""

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.tries = config.tries
        self._client = EndpointClient(config, "turn")
        self._options = {"max_tokens": config.max_tokens, "temperature": config.temperature}
        self._prompt = Path(config.prompt_file or PROMPT_FILE).read_text(encoding="utf-8").strip()

    async def write(self, request: TurnRequest) -> Written:
        """The next turn; see `Teacher`."""
        messages = await asyncio.to_thread(self.messages, request)

        def read(body: object) -> Written | None:
            text = reply_text(body)
            if text is None:
                return None
            prompt_tokens, completion_tokens = usage(body)
            return Written(text=text, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

        return await self._client.chat(messages, self._options, read)

    def usage(self) -> dict[str, float]:
        """Usage of this run; `cost` is in the currency of the config's prices."""
        spent = self._client.spent
        names = ("requests", "retries", "failed", "prompt_tokens", "completion_tokens")
        return {**{name: float(getattr(spent, name)) for name in names}, "cost": self._client.cost}

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def messages(self, request: TurnRequest) -> list[dict[str, Any]]:
        """The chat that requests a turn: prompt, conversation so far, directive."""
        first = [*self._image(request.images[0]), text_part(request.row.question)]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": self._prompt},
            {"role": "user", "content": first},
        ]
        for earlier in request.messages:
            if earlier.role == "assistant":
                messages.append({"role": "assistant", "content": earlier.text})
                continue
            parts = [text_part("<tool_response>")]
            parts += [part for image in earlier.images for part in self._image(image)]
            parts += [text_part(earlier.text)] if earlier.text or not earlier.images else []
            messages.append({"role": "user", "content": [*parts, text_part("</tool_response>")]})
        return [*messages, {"role": "user", "content": [text_part(directive(request))]}]

    def _image(self, image: Image.Image) -> list[dict[str, Any]]:
        if not self.config.image_pixels:
            return []
        size = fit_to_pixels(*image.size, min_pixels=1, max_pixels=self.config.image_pixels)
        assert size is not None
        return [image_part(image if size == image.size else image.resize(size), "JPEG")]


def directive(request: TurnRequest) -> str:
    """Text that tells the teacher what the turn must do; it is not part of the conversation."""
    step, size = request.step, request.images[request.step.image_index].size
    lines = [f"Directive for turn {request.number + 1} of {len(request.plan.steps)}:"]
    if step.repairs is not None:
        lines.append(
            f"The call before went wrong ({step.repairs.replace('_', ' ')}). Say what you notice, and repair it."
        )
    if step.action == "answer":
        lines.append(f"Answer now. The answer must say: {request.row.answer}")
    elif step.fault == "exception":
        lines.append(
            "Make a mistake in the code that a programmer would make (a misspelt method, an undefined name, a missing "
            "bracket), so that it raises an exception when it runs. The thought must not know of it."
        )
    if step.action == "turn":
        seen = phrases.STATE[step.undoes]
        aim = f"{phrases.UNDO[step.undoes]}, and do nothing else"
        note = " (which is wrong here; the thought believes in it)" if step.fault == "wrong_turn" else ""
        lines.append(f"Image {step.image_index} {seen}: {aim}{note}.")
    elif step.action == "crop":
        assert step.edges is not None
        before, edges = crop_arguments(step.edges, size, request.frame)
        code = f"{before}result = image.crop({edges})"
        note = " (which misses; the thought believes in it)" if step.fault == "missed_crop" else ""
        lines.append(
            f"Crop image {step.image_index} to what the question is about{note}, with these coordinates: {code}"
        )
    if step.action != "answer":
        lines.append(f"The call works on image_index {step.image_index}, which has {size[0]}x{size[1]} pixels.")
    if step.returns != "image":
        added = RETURNED[step.returns].strip()
        lines.append(f"End the code with the line {added}, so that it returns {RETURNS[step.returns]}.")
    if request.refusal:
        lines.append(f"Your last try was refused: {request.refusal}. Write the turn anew.")
    return "\n".join(lines)
