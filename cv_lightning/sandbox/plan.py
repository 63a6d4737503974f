"""The plan tier: straight-line code of known operations, run as checked calls without running model code.

The code is parsed, never compiled. Names stand for numbers, tuples and pictures; every call is one of a fixed list, its
arguments are bound and bounded here. Whatever is not on the list, or would fail or take long, is left to a child: this
module only ever says "done" or "not mine".
"""

from __future__ import annotations

import ast
import functools
import time
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from cv_lightning.images import compose, is_usable_size, to_rgb
from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.effect import effect_of
from cv_lightning.sandbox.geometry import describe
from cv_lightning.types import IDENTITY, Affine, Operation, SandboxResult, ToolStatus

MAX_DEPTH = 24
MAX_NUMBER = 1e6
METHODS = {
    "crop": ("box",),
    "rotate": ("angle", "resample", "expand"),
    "transpose": ("method",),
    "resize": ("size", "resample"),
    "convert": ("mode",),
    "copy": (),
}
"""Methods of a picture and the arguments that are taken, in order."""
IMAGE_OPS = ("mirror", "flip", "invert", "grayscale")
ENHANCERS = ("Contrast", "Brightness", "Sharpness", "Color")
SILENT = ("copy", "convert")
MS_PER_MEGAPIXEL = {"crop": 0.5, "rotate": 2.2, "rotate_free": 12.0, "transpose": 2.2, "resize": 15.0, "convert": 2.0, "copy": 0.5}
"""Rough cost by megapixel of the larger of input and output; operations not named: 4."""


class _NotMineError(Exception):
    """This code is for a child."""


@dataclass(frozen=True, slots=True)
class _Picture:
    image: Image.Image
    to_input: Affine | None
    lineage: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Module:
    name: str


@functools.lru_cache(maxsize=4096)
def _parse(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class _Plan:
    def __init__(self, image: Image.Image, config: SandboxConfig) -> None:
        self.config = config
        self.source = _Picture(image, IDENTITY, frozenset())
        self.scope: dict[str, Any] = {"image": self.source, "img": self.source}
        for name in ("Image", "ImageOps", "ImageEnhance"):
            self.scope[name] = _Module(name)
        self.operations: list[tuple[str, str, dict[str, Any], tuple[int, int], tuple[int, int]]] = []
        self.cost_ms = 0.0

    # ---------------------------------------------------------------------------------------- statements
    def run(self, tree: ast.Module) -> _Picture:
        for statement in tree.body:
            if isinstance(statement, ast.ImportFrom):
                self._import(statement)
            elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                self._assign(statement.targets[0], self._value(statement.value, 0))
            else:
                raise _NotMineError
        for name in ("result", "output", "processed_image", "image", "img"):
            found = self.scope.get(name)
            if isinstance(found, _Picture) and (name in ("result", "output") or found is not self.source):
                return found
            if name not in ("image", "img") and found is not None:
                raise _NotMineError
        raise _NotMineError

    def _import(self, statement: ast.ImportFrom) -> None:
        names = [alias.name for alias in statement.names if alias.asname is None]
        if statement.module != "PIL" or statement.level or len(names) != len(statement.names):
            raise _NotMineError
        if not set(names) <= {"Image", "ImageOps", "ImageEnhance"}:
            raise _NotMineError
        self.scope.update({name: _Module(name) for name in names})

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name) and not isinstance(value, _Module):
            self.scope[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(value, tuple) and len(value) == len(target.elts):
            for part, item in zip(target.elts, value, strict=True):
                self._assign(part, item)
        else:
            raise _NotMineError

    # ---------------------------------------------------------------------------------------- expressions
    def _value(self, node: ast.expr, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _NotMineError
        if isinstance(node, ast.Constant):
            return _bounded(node.value)
        if isinstance(node, ast.Name) and node.id in self.scope:
            return self.scope[node.id]
        if isinstance(node, ast.Tuple) and len(node.elts) <= 8:
            return tuple(self._value(item, depth + 1) for item in node.elts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -_number(self._value(node.operand, depth + 1))
        if isinstance(node, ast.BinOp):
            return _arithmetic(node.op, self._value(node.left, depth + 1), self._value(node.right, depth + 1))
        if isinstance(node, ast.Attribute):
            return self._attribute(node, depth)
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        raise _NotMineError

    def _attribute(self, node: ast.Attribute, depth: int) -> Any:
        value = self._value(node.value, depth + 1)
        if isinstance(value, _Picture) and node.attr in ("size", "width", "height"):
            return getattr(value.image, node.attr)
        if isinstance(value, _Module) and value.name == "Image":
            if node.attr in ("Transpose", "Resampling"):
                return _Module(node.attr)
            for kind in (Image.Transpose, Image.Resampling):
                if node.attr in kind.__members__ and hasattr(Image, node.attr):
                    return kind[node.attr]
        if isinstance(value, _Module) and value.name in ("Transpose", "Resampling"):
            members = getattr(Image, value.name).__members__
            if node.attr in members:
                return members[node.attr]
        raise _NotMineError

    def _call(self, node: ast.Call, depth: int) -> Any:
        if any(isinstance(item, ast.Starred) for item in node.args) or any(word.arg is None for word in node.keywords):
            raise _NotMineError
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("int", "min", "max") and function.id not in self.scope:
            numbers = [_number(self._value(item, depth + 1)) for item in node.args]
            if node.keywords or (len(numbers) != 1 if function.id == "int" else len(numbers) < 2):
                raise _NotMineError
            return {"int": int, "min": min, "max": max}[function.id](*numbers)  # type: ignore[operator]
        if not isinstance(function, ast.Attribute):
            raise _NotMineError
        if function.attr == "enhance" and isinstance(function.value, ast.Call):
            return self._enhance(node, function.value, depth)
        owner = self._value(function.value, depth + 1)
        args = [self._value(item, depth + 1) for item in node.args]
        words = {str(word.arg): self._value(word.value, depth + 1) for word in node.keywords}
        if isinstance(owner, _Picture) and function.attr in METHODS:
            return self._method(owner, function.attr, _bind(METHODS[function.attr], args, words))
        if isinstance(owner, _Module) and owner.name == "ImageOps" and function.attr in IMAGE_OPS and len(args) == 1 and not words:
            if isinstance(args[0], _Picture):
                return self._apply(args[0], f"ImageOps.{function.attr}", {}, getattr(ImageOps, function.attr))
        raise _NotMineError

    def _enhance(self, node: ast.Call, maker: ast.Call, depth: int) -> _Picture:
        kind = maker.func
        if not isinstance(kind, ast.Attribute) or kind.attr not in ENHANCERS or maker.keywords or node.keywords:
            raise _NotMineError
        module = self._value(kind.value, depth + 1)
        if not isinstance(module, _Module) or module.name != "ImageEnhance" or len(maker.args) != 1 or len(node.args) != 1:
            raise _NotMineError
        picture, factor = self._value(maker.args[0], depth + 1), _number(self._value(node.args[0], depth + 1))
        if not isinstance(picture, _Picture):
            raise _NotMineError
        enhancer = getattr(ImageEnhance, kind.attr)
        return self._apply(picture, f"ImageEnhance.{kind.attr}", {"factor": factor}, lambda image: enhancer(image).enhance(factor))

    # ---------------------------------------------------------------------------------------- operations
    def _method(self, picture: _Picture, name: str, arguments: dict[str, Any]) -> _Picture:
        size, cost = picture.image.size, MS_PER_MEGAPIXEL[name]
        if name == "crop":
            size = _box_size(arguments.get("box"))
        elif name == "resize":
            size = _target(arguments.get("size"))
        elif name == "rotate":
            angle = _number(arguments.get("angle"))
            if angle % 90:
                cost = MS_PER_MEGAPIXEL["rotate_free"]
        elif name == "transpose" and arguments.get("method") not in range(7):
            raise _NotMineError
        elif name == "convert" and arguments.get("mode") not in ("L", "RGB"):
            raise _NotMineError
        if size[0] * size[1] > self.config.max_result_pixels:
            raise _NotMineError
        self._spend(cost, max(size[0] * size[1], 0 if name == "crop" else picture.image.width * picture.image.height))
        method = getattr(Image.Image, name)
        return self._apply(picture, f"Image.{name}", arguments, lambda image: method(image, **arguments), spent=True)

    def _spend(self, ms: float, pixels: int) -> None:
        self.cost_ms += ms * pixels / 1e6
        if self.cost_ms > self.config.plan_budget_ms or len(self.operations) > 16:
            raise _NotMineError

    def _apply(self, picture: _Picture, call: str, arguments: dict[str, Any], function: Any, *, spent: bool = False) -> _Picture:
        if not spent:
            self._spend(4.0, picture.image.width * picture.image.height)
        image = function(picture.image)
        name, step = describe(call, arguments, picture.image.size, image.size)
        lineage = picture.lineage
        if name not in SILENT:
            lineage = lineage | {len(self.operations)}
            self.operations.append((name, call, arguments, picture.image.size, image.size))
        known = picture.to_input is not None and step is not None
        return _Picture(image, compose(picture.to_input, step) if known else None, lineage)  # type: ignore[arg-type]


def _bounded(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    return _number(value)


def _number(value: Any) -> int | float:
    if isinstance(value, int | float) and abs(value) <= MAX_NUMBER:  # also false for NaN
        return value
    raise _NotMineError


def _arithmetic(op: ast.operator, left: Any, right: Any) -> int | float:
    a, b = _number(left), _number(right)
    if isinstance(op, ast.Add):
        return _number(a + b)
    if isinstance(op, ast.Sub):
        return _number(a - b)
    if isinstance(op, ast.Mult):
        return _number(a * b)
    if isinstance(op, ast.Div) and b:
        return _number(a / b)
    if isinstance(op, ast.FloorDiv) and b:
        return _number(a // b)
    raise _NotMineError


def _bind(names: tuple[str, ...], args: list[Any], words: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(names) or not set(words) <= set(names[len(args) :]):
        raise _NotMineError
    bound = {**dict(zip(names, args, strict=False)), **words}
    return {name: bound[name] for name in names if name in bound}


def _box_size(box: Any) -> tuple[int, int]:
    if not isinstance(box, tuple) or len(box) != 4:
        raise _NotMineError
    left, top, right, bottom = (_number(v) for v in box)
    if right <= left or bottom <= top:
        raise _NotMineError
    return int(right - left) + 1, int(bottom - top) + 1


def _target(size: Any) -> tuple[int, int]:
    if not isinstance(size, tuple) or len(size) != 2 or not all(isinstance(v, int) and v > 0 for v in size):
        raise _NotMineError
    return size


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def run(image: Image.Image, code: str, config: SandboxConfig) -> SandboxResult | None:
    """Run a snippet as a plan, or say that it is not one.

    Args:
        image: the input, RGB; never changed.
        code: the snippet.
        config: limits; `plan_budget_ms` bounds the estimated cost.

    Returns:
        The result, bit-equal to what a child would give; None if the code is not a plan or would not succeed as one.
    """
    tree = _parse(code)
    if tree is None or not tree.body:
        return None
    begun = time.perf_counter()
    plan = _Plan(image, config)
    try:
        found = plan.run(tree)
    except (_NotMineError, ArithmeticError, TypeError, ValueError, KeyError, OSError, MemoryError, Image.DecompressionBombError):
        return None
    pixels = found.image.width * found.image.height
    if not is_usable_size(*found.image.size) or pixels > config.max_result_pixels:
        return None
    result = to_rgb(found.image)
    if result is image:
        result = image.copy()
    operations = tuple(
        Operation(name=name, call=call, arguments={k: _plain(v) for k, v in words.items()}, input_size=before, output_size=after, used=i in found.lineage)
        for i, (name, call, words, before, after) in enumerate(plan.operations)
    )
    effect = effect_of(found.to_input, image.size, result.size)
    elapsed = time.perf_counter() - begun
    return SandboxResult(status=ToolStatus.OK, image=result, operations=operations, effect=effect, tier="plan", elapsed_s=elapsed)
