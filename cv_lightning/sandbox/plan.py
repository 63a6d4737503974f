"""The plan tier: straight-line code of known operations, executed without running model code.

A snippet is parsed, and taken only if every statement is an assignment of numbers, tuples of numbers and chains of
known Pillow calls. Its numbers are computed and its operations called here, with checked arguments; nothing else of
it is ever evaluated. Whatever is not on the lists, or fails, is left to a child, so that errors read the same.
"""

from __future__ import annotations

import ast
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cv_lightning.images import compose, is_usable_size, to_rgb
from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.effect import effect_of
from cv_lightning.sandbox.geometry import describe
from cv_lightning.types import IDENTITY, Affine, Operation, SandboxResult, ToolStatus

MAX_STATEMENTS = 24
MAX_PIXELS = 16_000_000
MAX_RADIUS = 32.0
COST_MS_PER_MP = {
    "crop": 0.5, "transpose": 2.0, "rotate": 12.0, "resize": 12.0, "convert": 1.5, "copy": 0.5, "filter": 25.0,
    "mirror": 2.0, "flip": 1.0, "autocontrast": 5.0, "equalize": 5.0, "grayscale": 1.5, "invert": 2.0, "enhance": 4.0,
    "posterize": 2.0, "solarize": 2.0,
}  # fmt: skip
"""Estimated milliseconds per megapixel of the larger of input and output; a large radius costs more."""
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {"int": int, "float": float, "round": round, "min": min, "max": max, "abs": abs}
FILTERS = ("SHARPEN", "DETAIL", "SMOOTH", "SMOOTH_MORE", "BLUR", "EDGE_ENHANCE", "EDGE_ENHANCE_MORE", "FIND_EDGES")
CONSTANTS: dict[str, Any] = {
    **{f"Image.{m.name}": m for m in (*Image.Transpose, *Image.Resampling)},
    **{f"Image.Transpose.{m.name}": m for m in Image.Transpose},
    **{f"Image.Resampling.{m.name}": m for m in Image.Resampling},
    **{f"ImageFilter.{name}": getattr(ImageFilter, name) for name in FILTERS},
}
FILTER_CLASSES = {"GaussianBlur": ("radius",), "BoxBlur": ("radius",), "MedianFilter": ("size",)}
METHODS: dict[str, tuple[str, ...]] = {
    "crop": ("box",),
    "rotate": ("angle", "resample", "expand"),
    "transpose": ("method",),
    "resize": ("size", "resample"),
    "convert": ("mode",),
    "copy": (),
    "filter": ("filter",),
}
OPS: dict[str, tuple[str, ...]] = {
    "mirror": (), "flip": (), "autocontrast": ("cutoff",), "equalize": (), "grayscale": (), "invert": (),
    "posterize": ("bits",), "solarize": ("threshold",),
}  # fmt: skip
ENHANCERS = ("Contrast", "Brightness", "Sharpness", "Color")
RESERVED = {"Image", "ImageOps", "ImageEnhance", "ImageFilter", "PIL", *FUNCTIONS}
ALLOWED_NODES = (
    ast.Name, ast.Constant, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp, ast.Call, ast.Attribute, ast.keyword,
    ast.Load, ast.Store, ast.operator, ast.USub, ast.Subscript, ast.Assign,
)  # fmt: skip
FAILURES = (ArithmeticError, ValueError, TypeError, OSError, KeyError, IndexError, MemoryError, SystemError, AttributeError)
"""What a checked operation may raise; a child then tells the model about it."""


class NotPlannable(Exception):
    """The snippet is not a plan; a child has to run it."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture within a plan, and where it comes from."""

    image: Image.Image
    to_input: Affine | None
    lineage: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Enhancer:
    """`ImageEnhance.Contrast(image)` before `.enhance(factor)`."""

    kind: str
    source: Picture


# ------------------------------------------------------------------------------------------------ parsing
@lru_cache(maxsize=2048)
def parse_plan(code: str) -> tuple[ast.Assign, ...] | None:
    """The assignments of a snippet that may be a plan, None where it surely is none."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    statements = [node for node in body if not _is_promised_import(node)]
    assignments = tuple(node for node in statements if isinstance(node, ast.Assign) and _is_simple(node))
    if len(assignments) != len(statements) or not 0 < len(statements) <= MAX_STATEMENTS:
        return None
    return assignments


def _is_promised_import(node: ast.stmt) -> bool:
    """An import of what is in scope anyway, under its own name."""
    if isinstance(node, ast.ImportFrom):
        names = {"Image", "ImageOps", "ImageEnhance", "ImageFilter"}
        return node.module == "PIL" and all(alias.name in names and alias.asname is None for alias in node.names)
    if isinstance(node, ast.Import):
        usual = {("PIL", None), ("math", None), ("numpy", "np"), ("numpy", None), ("cv2", None)}
        return all((alias.name, alias.asname) in usual for alias in node.names)
    return False


def _is_simple(node: ast.Assign) -> bool:
    target = node.targets[0]
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    if len(node.targets) != 1 or not all(isinstance(name, ast.Name) and name.id not in RESERVED for name in names):
        return False
    return all(isinstance(child, ALLOWED_NODES) for child in ast.walk(node))


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


# ------------------------------------------------------------------------------------------------ running
@dataclass(slots=True)
class _Run:
    """Values of the names, and what is left of the time budget."""

    budget_ms: float
    names: dict[str, Any]
    operations: list[tuple[str, str, dict[str, Any], tuple[int, int], tuple[int, int]]] = field(default_factory=list)

    def assign(self, node: ast.Assign) -> None:
        target, value = node.targets[0], self.value(node.value)
        if isinstance(target, ast.Name):
            self.names[target.id] = value
            return
        names = [name.id for name in getattr(target, "elts", ()) if isinstance(name, ast.Name)]
        if not isinstance(value, tuple) or len(value) != len(names):
            raise NotPlannable("unpacking")
        self.names.update(zip(names, value, strict=True))

    # ------------------------------------------------------------------ values
    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value if node.value is None or isinstance(node.value, bool | str) else _in_range(node.value)
        if isinstance(node, ast.Name):
            if node.id not in self.names:
                raise NotPlannable(node.id)
            return self.names[node.id]
        if isinstance(node, ast.Tuple):
            return tuple(self._number(element) for element in node.elts)
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return _in_range(ARITHMETIC[type(node.op)](self._number(node.left), self._number(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._number(node.operand)
        if isinstance(node, ast.Subscript):
            whole, index = self.value(node.value), self.value(node.slice)
            if isinstance(whole, tuple) and type(index) is int and -len(whole) <= index < len(whole):
                return whole[index]
        elif isinstance(node, ast.Attribute):
            return self._attribute(node)
        elif isinstance(node, ast.Call):
            return self._call(node)
        raise NotPlannable(type(node).__name__)

    def _number(self, node: ast.expr) -> Any:
        value = self.value(node)
        if type(value) not in (int, float):
            raise NotPlannable("not a number")
        return value

    def _attribute(self, node: ast.Attribute) -> Any:
        dotted = _dotted(node)
        if dotted in CONSTANTS:
            return CONSTANTS[dotted]
        if node.attr in ("size", "width", "height"):
            owner = self.value(node.value)
            if isinstance(owner, Picture):
                return getattr(owner.image, node.attr)
        raise NotPlannable(node.attr)

    # ------------------------------------------------------------------ calls
    def _call(self, node: ast.Call) -> Any:
        args = [self.value(argument) for argument in node.args]
        kwargs = {keyword.arg or "**": self.value(keyword.value) for keyword in node.keywords}
        if isinstance(node.func, ast.Name):
            numbers = args and not kwargs and all(type(value) in (int, float) for value in args)
            if node.func.id not in FUNCTIONS or not numbers:
                raise NotPlannable(node.func.id)
            return _in_range(FUNCTIONS[node.func.id](*args))
        if not isinstance(node.func, ast.Attribute):
            raise NotPlannable("call")
        module, _, name = _dotted(node.func).rpartition(".")
        if module == "ImageFilter" and name in FILTER_CLASSES:
            return _make_filter(name, _named(FILTER_CLASSES[name], args, kwargs))
        if module in ("ImageOps", "ImageEnhance"):
            return self._module_call(module, name, args, kwargs)
        owner = self.value(node.func.value)
        if isinstance(owner, _Enhancer) and node.func.attr == "enhance":
            arguments = _named(("factor",), args, kwargs)
            if type(arguments.get("factor")) not in (int, float):
                raise NotPlannable("enhance")
            return self._operate(f"ImageEnhance.{owner.kind}", "enhance", owner.source, arguments)
        if isinstance(owner, Picture) and node.func.attr in METHODS:
            arguments = _named(METHODS[node.func.attr], args, kwargs)
            return self._operate(f"Image.{node.func.attr}", node.func.attr, owner, arguments)
        raise NotPlannable(node.func.attr)

    def _module_call(self, module: str, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Picture):
            raise NotPlannable(name)
        if module == "ImageOps" and name in OPS:
            return self._operate(f"ImageOps.{name}", name, args[0], _named(OPS[name], args[1:], kwargs))
        if module == "ImageEnhance" and name in ENHANCERS and len(args) == 1 and not kwargs:
            return _Enhancer(name, args[0])
        raise NotPlannable(name)

    # ------------------------------------------------------------------ operations
    def _operate(self, call: str, name: str, source: Picture, arguments: dict[str, Any]) -> Picture:
        size = source.image.size
        made = _check(name, size, arguments)
        pixels = made if name == "crop" else max(size[0] * size[1], made)
        self.budget_ms -= _cost(name, arguments) * pixels / 1e6
        if self.budget_ms < 0:
            raise NotPlannable("too slow to run in the caller")
        image = _execute(call, name, source.image, arguments)
        shown = _shown(arguments)
        label, step = describe(call, shown, size, image.size)
        lineage = source.lineage
        if label not in ("copy", "convert"):
            lineage = lineage | {len(self.operations)}
            self.operations.append((label, call, shown, size, image.size))
        known = compose(source.to_input, step) if source.to_input is not None and step is not None else None
        return Picture(image, known, lineage)


def _in_range(value: object) -> Any:
    if type(value) in (int, float) and abs(value) < 1e6:  # type: ignore[arg-type]
        return value
    raise NotPlannable("a number out of range")


def _named(names: tuple[str, ...], args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(names) or not set(kwargs) <= set(names[len(args) :]):
        raise NotPlannable("arguments")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _make_filter(name: str, arguments: dict[str, Any]) -> ImageFilter.Filter:
    if not all(type(value) in (int, float) and 0 <= value <= MAX_RADIUS for value in arguments.values()):
        raise NotPlannable("radius")
    made: ImageFilter.Filter = getattr(ImageFilter, name)(**arguments)
    return made


def _cost(name: str, arguments: dict[str, Any]) -> float:
    if name == "rotate" and arguments["angle"] % 180 == 0:
        return COST_MS_PER_MP["transpose"]
    if name == "rotate" and arguments["angle"] % 90 == 0 and arguments.get("expand"):
        return COST_MS_PER_MP["transpose"]
    if name == "filter" and isinstance(arguments["filter"], ImageFilter.MedianFilter):
        return COST_MS_PER_MP["filter"] * arguments["filter"].size ** 2
    return COST_MS_PER_MP[name]


def _check(name: str, size: tuple[int, int], arguments: dict[str, Any]) -> int:
    """Pixels that the result will have; refuses arguments that are not surely harmless."""
    width, height = size
    good = True
    if name == "crop":
        box = arguments.get("box")
        good = isinstance(box, tuple) and len(box) == 4 and box[0] < box[2] and box[1] < box[3]
        if good:
            width, height = round(box[2]) - round(box[0]), round(box[3]) - round(box[1])
    elif name == "resize":
        wanted = arguments.get("size")
        good = isinstance(wanted, tuple) and len(wanted) == 2 and all(type(v) is int and v > 0 for v in wanted)
        width, height = wanted if good else (0, 0)
    elif name == "rotate":
        good = type(arguments.get("angle")) in (int, float)
        width, height = (2 * width, 2 * height) if good and arguments["angle"] % 90 else size
    elif name == "transpose":
        good = isinstance(arguments.get("method"), int)
    elif name == "filter":
        good = isinstance(arguments.get("filter"), ImageFilter.Filter | type)
    elif name == "convert":
        good = arguments.get("mode") in ("L", "RGB")
    if not good or not 0 < width * height <= MAX_PIXELS:
        raise NotPlannable(name)
    return int(width * height)


def _execute(call: str, name: str, image: Image.Image, arguments: dict[str, Any]) -> Image.Image:
    made: Image.Image
    if call.startswith("ImageEnhance."):
        made = getattr(ImageEnhance, call.split(".")[1])(image).enhance(arguments["factor"])
    elif call.startswith("ImageOps."):
        made = getattr(ImageOps, name)(image, **arguments)
    else:
        made = getattr(Image.Image, name)(image, **arguments)
    return made


def _shown(arguments: dict[str, Any]) -> dict[str, Any]:
    if "filter" in arguments:
        kind = arguments["filter"]
        values = {k: v for k, v in getattr(kind, "__dict__", {}).items() if not k.startswith("_")}
        return {"filter": kind.__name__ if isinstance(kind, type) else type(kind).__name__, **values}
    return {k: int(v) if isinstance(v, Image.Transpose | Image.Resampling) else v for k, v in arguments.items()}


# ------------------------------------------------------------------------------------------------ entry
def run(image: Image.Image, code: str, config: SandboxConfig) -> SandboxResult | None:
    """Execute a snippet as a plan; None where it is none, would take longer than `plan_budget_ms`, or fails.

    Args:
        image: the input, RGB; not changed.
        code: the snippet.
        config: limits of time and of the result's size.
    """
    started = time.perf_counter()
    assignments = parse_plan(code)
    if assignments is None or image.mode != "RGB":
        return None
    start = Picture(image, IDENTITY, frozenset())
    state = _Run(config.plan_budget_ms, {"image": start, "img": start})
    try:
        for node in assignments:
            state.assign(node)
    except (NotPlannable, *FAILURES):
        return None
    result = state.names.get("result")
    if result is None:
        result = next((state.names[name] for name in ("image", "img") if state.names[name] is not start), None)
    if not isinstance(result, Picture):
        return None
    size = result.image.size
    if not is_usable_size(*size) or size[0] * size[1] > config.max_result_pixels:
        return None
    rgb = to_rgb(result.image)
    operations = tuple(
        Operation(name=name, call=f"PIL.{call}", arguments=shown, input_size=before, output_size=after, used=i in result.lineage)
        for i, (name, call, shown, before, after) in enumerate(state.operations)
    )
    return SandboxResult(
        status=ToolStatus.OK,
        image=rgb.copy() if rgb is image else rgb,
        operations=operations,
        effect=effect_of(result.to_input, image.size, size),
        tier="plan",
        elapsed_s=time.perf_counter() - started,
    )
