"""The type of the weights that an engine gets.

It has a file of its own, as jsonargparse runs the `TYPE_CHECKING` imports of a config's module, and the help of a verb
must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

    NamedTensors: TypeAlias = Iterable[tuple[str, torch.Tensor]]
else:
    NamedTensors = Iterable
