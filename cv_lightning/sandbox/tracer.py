"""Records which image operations ran, with which arguments, and how the pixels moved.

It runs in the child. Library functions are wrapped once, in the fork server; only outermost calls are recorded. A
Pillow image carries its origin as an attribute; an array is recognised by its memory, because address and strides of a
view determine which part of which array it is and how it is turned. The record is a claim: model code shares the
process and can forge it, so the parent compares pixels before it believes a map.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from cv_lightning.images import compose
from cv_lightning.sandbox.geometry import (
    ENHANCERS,
    GEOMETRIC,
    PLAIN,
    RESIZES,
    SILENT,
    TURNS,
    Size,
    describe,
    filter_arguments,
)
from cv_lightning.sandbox.wire import MAX_ARGUMENTS, MAX_CLAIMS, MAX_OPERATIONS, Trace
from cv_lightning.types import ERASED, IDENTITY, Affine, Operation

ORIGIN = "_cvl_origin"
METHODS = (
    "Image.transpose Image.filter Image.convert Image.point Image.quantize Image.paste Image.alpha_composite "
    "Image.putalpha Image.copy Image.effect_spread"
).split()
"""Methods of images that are traced besides those of the tables in `geometry`."""
IN_PLACE = {
    *("Image.thumbnail", "Image.paste", "Image.alpha_composite", "Image.putalpha"),
    *(call for call, name in PLAIN.items() if name == "draw"),
}
"""Calls that change their image."""
CV2_NAMES = {
    "rotate": ("src", "code"),
    "flip": ("src", "code"),
    "resize": ("src", "size", "dst", "fx", "fy", "interpolation"),
    "warpAffine": ("src", "matrix", "size", "dst", "flags"),
    "GaussianBlur": ("src", "ksize", "sigma"),
    "medianBlur": ("src", "ksize"),
    "cvtColor": ("src", "code"),
    "Canny": ("src", "low", "high"),
}
"""Names of the positional arguments of OpenCV's functions, which have no signature."""
CV2_KEYWORDS = {"rotateCode": "code", "flipCode": "code", "dsize": "size", "M": "matrix", "sigmaX": "sigma"}


class Origin(NamedTuple):
    """The origin of an image or array: its map to the input, and the operations on the way (by their number)."""

    to_input: Affine | None
    lineage: frozenset[int]
    direct: bool = True
    """False once a step had to be guessed."""


NOWHERE = Origin(None, frozenset(), False)


class _Array(NamedTuple):
    array: Any
    start: int
    end: int
    origin: Origin


@dataclass
class Tracer:
    """State of one snippet's trace."""

    active: bool = False
    depth: int = 0
    operations: list[Operation] = field(default_factory=list)
    arrays: list[_Array] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    num_recorded: int = 0
    """Number of operations recorded; if the list has fewer, model code removed some."""
    tampered: bool = False

    # -------------------------------------------------------------------------------------------- origins
    def origin_of(self, thing: Any) -> Origin | None:
        """Origin of an image or array, as far as known."""
        if isinstance(thing, Image.Image):
            found = thing.__dict__.get(ORIGIN)
            return found if isinstance(found, Origin) else None
        if isinstance(thing, np.ndarray):
            return self._array_origin(thing)
        return None

    def _array_origin(self, view: np.ndarray[Any, Any]) -> Origin | None:
        if view.ndim < 2 or not view.size:
            return None
        address = view.__array_interface__["data"][0]
        shared: list[_Array] = [known for known in self.arrays if known.start <= address < known.end]
        if not shared:
            return None
        # Views made by traced calls (np.rot90) carry operations; arrays that share their memory may come from them.
        lineage = frozenset().union(*(known.origin.lineage for known in shared))
        same: list[Origin] = [known.origin for known in shared if known.array is view]
        if same:
            return same[-1]
        for known in reversed(shared):
            if known.array.flags.c_contiguous:
                step, base = _view_map(known, view, address), known.origin.to_input
                if step is None or base is None:
                    return Origin(None, lineage, False)
                return Origin(compose(base, step), lineage, known.origin.direct)
        return Origin(None, lineage, False)

    def set_origin(self, thing: Any, origin: Origin) -> None:
        """Remember where an image or array came from."""
        if isinstance(thing, Image.Image):
            thing.__dict__[ORIGIN] = origin
        elif isinstance(thing, np.ndarray) and thing.ndim >= 2 and thing.size and len(self.arrays) < 256:
            low, high = _extent(thing)
            self.arrays.append(_Array(thing, low, high, origin))
        if len(self.origins) < 512:
            self.origins.append(origin)

    def guess(self) -> Origin:
        """Origin of something that untraced code made: the last known one, not direct."""
        if not self.arrays and not self.origins:
            return NOWHERE
        last = self.arrays[-1].origin if self.arrays else self.origins[-1]
        return last._replace(direct=False)

    # -------------------------------------------------------------------------------------------- recording
    def record(self, call: str, arguments: dict[str, Any], source: Any, result: Any, size: Size | None = None) -> None:
        """Record a call that ran, and derive the origin of `result` from that of `source`.

        Args:
            call: Name of the function.
            arguments: Its arguments, by name.
            source: The image or array that it was applied to.
            result: The image or array that it made, or changed.
            size: Size of `source` before the call, if the call may have changed it.
        """
        size, output = size or size_of(source), size_of(result)
        if size is None or output is None:
            return
        before = self.origin_of(source) or self.guess()
        try:
            name, step = describe(call, arguments, size, output)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError, OverflowError):
            name, step = call.rsplit(".", 1)[-1].lower()[:32], None
        lineage = before.lineage
        if name not in SILENT and len(self.operations) < MAX_OPERATIONS:
            lineage = lineage | {len(self.operations)}
            self.operations.append(
                Operation(name=name, call=call, arguments=arguments, input_size=size, output_size=output)
            )
            self.num_recorded += 1
        to_input = compose(before.to_input, step) if before.to_input is not None and step is not None else None
        self.set_origin(result, Origin(to_input, lineage, before.direct and to_input is not None))

    def stop(self) -> None:
        """End the recording."""
        self.tampered = not self.active or self.depth != 0 or self.num_recorded != len(self.operations)
        self.active = False

    def finish(self, result: Any) -> Trace:
        """The trace of a snippet whose result this is; None: it made no image, and no operation reached one."""
        origin = NOWHERE if result is None else self.origin_of(result) or self.guess()
        claims: list[Affine] = [] if origin.to_input is None else [origin.to_input]
        for other in reversed(self.origins if result is not None else []):
            if other.to_input is not None and other.to_input not in claims and len(claims) < MAX_CLAIMS:
                claims.append(other.to_input)
        operations = [
            replace(operation, arguments=plain_arguments(operation.arguments), used=i in origin.lineage)
            for i, operation in enumerate(self.operations)
        ]
        if self.tampered:
            # Seen only where model code was careless; what the pixels prove does not depend on it.
            operations.append(Operation(name=ERASED, call="tracer", used=False))
        return Trace(tuple(operations[-MAX_OPERATIONS:]), tuple(claims), origin.direct and bool(claims))


TRACER = Tracer()
"""The only trace of this process, because a child runs one snippet."""


def _extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    low = array.__array_interface__["data"][0]
    span = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    return low + sum(s for s in span if s < 0), low + sum(s for s in span if s > 0) + array.itemsize


def _view_map(known: _Array, view: np.ndarray[Any, Any], address: int) -> Affine | None:
    """Map from a view to the array whose memory it shows, from address and strides alone."""
    base = known.array
    row, column = base.strides[:2]
    if row == 0 or column == 0:
        return None
    offset = address - base.__array_interface__["data"][0]
    rows: list[tuple[int, int]] = []
    for stride, length in zip(view.strides[:2], view.shape[:2], strict=True):
        if length == 1 or stride == 0:
            rows.append((1, 0) if not rows else (0, 1))
        elif abs(stride) >= abs(row) and stride % row == 0:
            rows.append((stride // row, 0))
        elif stride % column == 0:
            rows.append((0, stride // column))
        else:
            return None
    top, rest = divmod(offset, row)
    left = rest // column
    (yy, yx), (xy, xx) = rows
    if abs(yy * xx - yx * xy) < 1:
        return None
    # The view's pixel (i, j) is the base's (left + i*xx + j*yx, top + i*xy + j*yy); edges lie half a pixel outside.
    shift_x = left + 0.5 - 0.5 * (xx + yx)
    shift_y = top + 0.5 - 0.5 * (xy + yy)
    return Affine(xx, yx, shift_x, xy, yy, shift_y)


def size_of(thing: Any) -> Size | None:
    """Width and height of an image or array, None for anything else."""
    if isinstance(thing, Image.Image):
        return thing.size
    if isinstance(thing, np.ndarray) and thing.ndim >= 2:
        return int(thing.shape[1]), int(thing.shape[0])
    return None


def plain_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The first arguments as plain values: arrays and images as their shape, texts and tuples cut."""
    return {key[:24]: plain(value) for key, value in list(arguments.items())[:MAX_ARGUMENTS]}


def plain(value: Any, depth: int = 0) -> Any:
    """A value as a finite number, a short text or a tuple of them."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 1 << 62:
        return int(value)
    if isinstance(value, int | float):
        return float(value) if abs(value) < 1e300 else 0.0
    if isinstance(value, str):
        return value[:60]
    if isinstance(value, np.ndarray):
        return "array " + "x".join(map(str, value.shape))
    if isinstance(value, Image.Image):
        return f"image {value.width}x{value.height}"
    if isinstance(value, tuple | list) and depth < 3:
        return tuple(plain(item, depth + 1) for item in value[:16])
    return type(value).__name__


# ------------------------------------------------------------------------------------------------ wrapping
Note = Callable[[Any, tuple[Any, ...], dict[str, Any], Size | None], None]
"""Records a call, given its result, its arguments, and the size of its first argument before the call."""


def _wrap(function: Callable[..., Any], note: Note) -> Callable[..., Any]:
    """Call `note` after outermost calls of `function` while the tracer is active."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        if not TRACER.active or TRACER.depth:
            return function(*args, **kwargs)
        TRACER.depth += 1
        size = size_of(args[0]) if args else None
        try:
            result = function(*args, **kwargs)
            note(result, args, kwargs, size)
            return result
        finally:
            TRACER.depth -= 1

    return traced


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    extra = arguments.pop("kwargs", None)
    return {**arguments, **extra} if isinstance(extra, dict) else arguments


def _wrap_call(call: str) -> None:
    """Wrap a method of images (`Image.rotate`) or a function of a loaded library (`ImageOps.mirror`, `cv2.flip`)."""
    folder, _, name = call.rpartition(".")
    owner: Any = {"Image": Image.Image, "ImageOps": ImageOps}.get(folder) or sys.modules.get(folder)
    original = getattr(owner, name, None)
    if original is None:
        return
    signature = None if folder == "cv2" else inspect.signature(original)

    def note(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: Size | None) -> None:
        if signature is None:
            source: Any = args[0] if args else kwargs.get("src")
            arguments = _cv2_arguments(name, args, kwargs)
        else:
            arguments = _bound(signature, args, kwargs)
            source = arguments.pop(next(iter(arguments)))
        if call == "Image.filter":
            arguments = filter_arguments(arguments["filter"])
        elif call == "Image.thumbnail":
            arguments = {"size": source.size}
        out = result[1] if isinstance(result, tuple) and len(result) == 2 else result
        TRACER.record(call, arguments, source, source if call in IN_PLACE else out, size)

    setattr(owner, name, _wrap(original, note))


def _cv2_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = CV2_NAMES.get(name, ("src",))
    arguments = dict(zip([*names, *(f"arg{i}" for i in range(len(names), 8))], args, strict=False))
    arguments.update({CV2_KEYWORDS.get(key, key): value for key, value in kwargs.items()})
    if "matrix" in arguments:
        arguments["matrix"] = tuple(float(v) for v in np.asarray(arguments["matrix"]).ravel()[:6])
    return {key: value for key, value in arguments.items() if key not in ("src", "dst")}


def _wrap_enhancer(name: str) -> None:
    kind = getattr(ImageEnhance, name)
    original = kind.enhance

    def note(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: Size | None) -> None:
        factor = args[1] if len(args) > 1 else kwargs.get("factor")
        TRACER.record(f"ImageEnhance.{name}", {"factor": factor}, args[0].image, result)

    kind.enhance = _wrap(original, note)
    # Making an enhancer converts and filters the image internally; these are not operations of the snippet.
    kind.__init__ = _wrap(kind.__init__, lambda *_: None)


def _wrap_conversions() -> None:
    """Pass origins on where images become arrays and arrays become images; nothing is reported."""

    def to_array(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: Size | None) -> None:
        source = args[0] if args else kwargs.get("object", kwargs.get("a"))
        origin = TRACER.origin_of(source)
        if isinstance(result, np.ndarray) and origin is not None and size_of(result) == size_of(source):
            TRACER.set_origin(result, origin)

    for name in ("array", "asarray", "ascontiguousarray", "copy", "clip"):
        setattr(np, name, _wrap(getattr(np, name), to_array))

    def to_image(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: Size | None) -> None:
        source = args[0] if args else kwargs.get("obj")
        origin = TRACER.origin_of(source)
        TRACER.set_origin(result, origin if origin is not None else TRACER.guess())

    Image.fromarray = _wrap(Image.fromarray, to_image)

    def drawing(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: Size | None) -> None:
        source = args[0] if args else kwargs.get("im")
        TRACER.record("ImageDraw.Draw", {}, source, source)

    ImageDraw.Draw = _wrap(ImageDraw.Draw, drawing)


def install() -> None:
    """Wrap the libraries of this process. Once, in the fork server, before any snippet."""
    for call in (*METHODS, *TURNS, *GEOMETRIC, *RESIZES, *PLAIN):
        _wrap_call(call)
    for name in ENHANCERS:
        _wrap_enhancer(name)
    _wrap_conversions()


def begin(image: Image.Image) -> None:
    """Start tracing: `image` is the input."""
    vars(TRACER).update(vars(Tracer(active=True)))
    TRACER.set_origin(image, Origin(IDENTITY, frozenset()))
