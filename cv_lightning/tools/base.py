"""Base class of tools: name, description and JSON schema for the policy, and a coroutine that runs one call.

To add a tool, write a subclass of `Tool` in any module and name it in the config:

    rollout:
      agent:
        tools:
          - class_path: my_tools.Grid
            init_args: {color: red}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image

from cv_lightning.images import compose
from cv_lightning.types import Affine, SandboxResult, ToolImage, ToolResult, ToolStatus, TrajectoryImage

Coordinates = Literal["original_px", "model_px", "relative_1000"]
"""Frame of sizes and positions in texts for the model."""
IMAGE_INDEX = "image_index"
"""Name of an integer argument that selects one of the trajectory's images; the agent checks that the image exists."""


class CodeRunner(Protocol):
    """The part of a sandbox that tools use."""

    async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
        """Run a snippet on an image; cancelling the coroutine ends the snippet.

        Args:
            image: The image.
            code: Python with `image` in scope.
            owner: The trajectory.
            max_shown: Images that it may show, beside what it prints; 0: one image and no text.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext:
    """The trajectory that calls a tool; a tool must not change it."""

    images: Sequence[TrajectoryImage]
    """Images of the trajectory so far: the task's own, then those that calls made."""
    owner: str
    """Id of the trajectory, unique within a rollout."""
    sandbox: CodeRunner
    """The sandbox that runs code of the policy."""
    coordinates: Coordinates = "original_px"
    """Frame of the sizes that the policy reads, `prompt.coordinates`."""

    def derived(self, image: Image.Image, parent: int, to_parent: Affine | None) -> ToolImage:
        """An image made from one of the trajectory's images, with the map to its source image.

        Args:
            image: The image at full resolution, RGB.
            parent: Index of the image it was made from.
            to_parent: Map of its pixel coordinates to those of the parent; `IDENTITY` for a drawing on the parent, None
                if there is no such map.
        """
        before = self.images[parent].to_source
        to_source = None if before is None or to_parent is None else compose(before, to_parent)
        return ToolImage(image=image, parent=parent, to_source=to_source)


class Tool(ABC):
    """A tool that the policy can call. A subclass sets the attributes, in the class or in `__init__`."""

    name: str
    """Name by which the policy calls it: letters, digits, `_` and `-`."""
    description: str
    """Rest of a sentence that begins with the name: "draws a grid over an image and shows it"."""
    parameters: Mapping[str, Any]
    """JSON schema (2020-12) of the arguments: an object with `properties`. The system prompt lists each property with
    its type and `description`, and calls are checked against it before they run. `examples` of a property show the
    policy how to call; a property with a `default` may be left out."""
    opening: str = "You may look closer: call a tool below and look at the result before you answer."
    """Sentence of the system prompt that introduces the tool if it is the only one."""
    max_images: int = 1
    """Images that one call may return."""
    max_text_tokens: int | None = None
    """Tokens of `ToolResult.text` that the policy reads; the middle of a longer text is cut out. None: as many as
    `agent.max_tool_text_chars` allows."""
    hints: Sequence[str] = ()
    """Lines of the system prompt on how to answer: when to use the tool."""

    @abstractmethod
    async def call(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        """Run one call, on the background thread; many calls run at once.

        Args:
            arguments: Arguments that fit `parameters`, defaults filled in.
            context: The trajectory.

        Returns:
            The result that the model sees. A call that fails by the policy's fault has the status ERROR and an error
            text.

        Raises:
            Exception: The tool itself failed; the trajectory is masked, never scored as wrong. A policy must not be
                able to cause this.
        """

    def __repr__(self) -> str:
        """Class and settings, the same in every process: evaluations compare it before they continue."""
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__module__}.{type(self).__qualname__}({settings})"


def missing_image(arguments: Mapping[str, Any], num_images: int) -> ToolResult | None:
    """The result of a call on an image that does not exist; None if the image exists."""
    index = arguments.get(IMAGE_INDEX, 0)
    if not isinstance(index, int) or 0 <= index < num_images:
        return None
    error = f"image_index {index} does not exist; there are {num_images} images, numbered from 0"
    return ToolResult(status=ToolStatus.REJECTED, error=error, error_kind=IMAGE_INDEX)
