"""Reading operations off the text of a snippet, without running it, as the released code counts them.

A syntax tree is read, never text by regular expressions, so comments, strings and descriptions say nothing and time is
linear in the size of the code. Branches that a constant condition rules out and functions that nothing calls are left
out. What needs a value that only running tells (`image.size`) gives a label without a box, or nothing.
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

from cv_lightning.types import Box

_TRANSPOSES = {
    "FLIP_LEFT_RIGHT": "flip_horizontal",
    "FLIP_TOP_BOTTOM": "flip_vertical",
    "ROTATE_90": "rotate_90",
    "ROTATE_180": "rotate_180",
    "ROTATE_270": "rotate_270",
}
_TRANSPOSE_CODES = dict(enumerate(_TRANSPOSES.values()))
_CV2_ROTATIONS = {
    "ROTATE_90_CLOCKWISE": "rotate_270",
    "ROTATE_180": "rotate_180",
    "ROTATE_90_COUNTERCLOCKWISE": "rotate_90",
}
_CV2_CODES = dict(enumerate(_CV2_ROTATIONS.values()))
_BY_NAME = {
    "mirror": "flip_horizontal",
    "fliplr": "flip_horizontal",
    "flipud": "flip_vertical",
    "resize": "resize",
    "thumbnail": "resize",
    "grayscale": "grayscale",
    "autocontrast": "autocontrast",
    "equalize": "equalize",
    "invert": "invert",
    "posterize": "posterize",
    "solarize": "solarize",
    "filter": "filter",
}
_ENHANCERS = {"Contrast": "contrast", "Brightness": "brightness", "Sharpness": "sharpness", "Color": "color"}
MAX_CODE_CHARS = 20_000
MAX_STEPS = 20_000
"""Syntax nodes that are read."""


class CodeReading(NamedTuple):
    """What the text of a snippet says it does."""

    labels: frozenset[str] = frozenset()
    boxes: tuple[Box, ...] = ()
    """Crop boxes with constant edges, in the frame of the image that is cropped."""


@dataclass(slots=True)
class _Reader:
    values: dict[str, float | tuple[float, ...]] = field(default_factory=dict)
    """Constants by name, as assigned so far."""
    labels: set[str] = field(default_factory=set)
    boxes: list[Box] = field(default_factory=list)


def read_code(code: str | None) -> CodeReading:
    """Labels and constant crop boxes of a snippet; empty for text that is not Python.

    Args:
        code: Python; more than `MAX_CODE_CHARS` is not read.
    """
    if not code or len(code) > MAX_CODE_CHARS:
        return CodeReading()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's warnings about a policy's code do not matter
            tree = ast.parse(code)
        reader = _Reader()
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        called = {function.id for function in calls if isinstance(function, ast.Name)}
        for node in _live_nodes(tree, called)[:MAX_STEPS]:
            _read_node(node, reader)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return CodeReading()
    return CodeReading(frozenset(reader.labels), tuple(reader.boxes))


def _live_nodes(tree: ast.AST, called: set[str]) -> list[ast.AST]:
    """Nodes in the order of the text, without dead branches and functions that are not called."""
    found: list[ast.AST] = []
    stack = [(tree, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name in called:
            children = list(ast.iter_child_nodes(node))
            if isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Constant):
                children = list(node.body if node.test.value else node.orelse)
            stack.append((node, True))
            stack += [(child, False) for child in reversed(children)]
    return found


def _read_node(node: ast.AST, reader: _Reader) -> None:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        _assign(node.targets[0], node.value, reader)
    elif isinstance(node, ast.Subscript):
        _read_slices(node, reader)
    elif isinstance(node, ast.Call):
        _read_call(node, reader)


def _assign(target: ast.expr, value: ast.expr, reader: _Reader) -> None:
    if isinstance(target, ast.Name):
        known = _constant(value, reader)
        if known is None:
            reader.values.pop(target.id, None)
        else:
            reader.values[target.id] = known
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for one, other in zip(target.elts, value.elts, strict=True):
            _assign(one, other, reader)


def _constant(node: ast.expr, reader: _Reader) -> float | tuple[float, ...] | None:
    """Number or tuple of numbers, with names and arithmetic worked out."""
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float() as number) if abs(number) < 1e9:
            return float(number)
        case ast.Name(id=name):
            return reader.values.get(name)
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            values = [_number(element, reader) for element in elements]
            return None if None in values else tuple(value for value in values if value is not None)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _number(operand, reader)
            return None if inner is None else -inner
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(_number(left, reader), op, _number(right, reader))
        case ast.Call(func=ast.Name(id="int" | "float" | "round"), args=[single]):
            return _number(single, reader)
    return None


def _number(node: ast.expr, reader: _Reader) -> float | None:
    value = _constant(node, reader)
    return value if isinstance(value, float) else None


def _arithmetic(left: float | None, op: ast.operator, right: float | None) -> float | None:
    if left is None or right is None:
        return None
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div() | ast.FloorDiv() if right:
            return left / right if isinstance(op, ast.Div) else float(left // right)
    return None


# ------------------------------------------------------------------------------------------------ calls
def _read_call(node: ast.Call, reader: _Reader) -> None:
    if not isinstance(node.func, ast.Attribute):
        return
    owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    name = node.func.attr
    if name == "crop" and owner != "ImageOps":
        _add_crop(_argument(node, 0, "box"), reader)
    elif name == "enhance":
        _add_enhancement(node, reader)
    elif name == "convert":
        mode = _argument(node, 0, "mode")
        reader.labels |= {"grayscale"} if isinstance(mode, ast.Constant) and mode.value in ("L", "1", "LA") else set()
    elif label := _turn(owner, name, node, reader) or _BY_NAME.get(name):
        reader.labels.add(label)


def _turn(owner: str, name: str, node: ast.Call, reader: _Reader) -> str | None:
    """Label of a turn or flip; None for other calls and turns by no right angle."""
    match owner, name:
        case "cv2", "rotate":
            return _named(_argument(node, 1, "rotateCode"), _CV2_ROTATIONS, _CV2_CODES, reader)
        case "cv2", "flip":
            code = _value(_argument(node, 1, "flipCode"), reader)
            names = {0: "flip_vertical", 1: "flip_horizontal", -1: "rotate_180"}
            return None if code is None else names[(code > 0) - (code < 0)]
        case (("np" | "numpy"), "rot90"):
            return _rotation(90 * (_value(_argument(node, 1, "k"), reader, 1.0) or 0.0))
        case (("np" | "numpy"), "flip"):
            axis = _value(_argument(node, 1, "axis"), reader)
            return None if axis is None else {0: "flip_vertical", 1: "flip_horizontal"}.get(int(axis))
        case "ImageOps", "flip":
            return "flip_vertical"
        case _, "transpose":
            return _named(_argument(node, 0, "method"), _TRANSPOSES, _TRANSPOSE_CODES, reader)
        case _, "rotate":
            angle = _value(_argument(node, 0, "angle"), reader)
            return None if angle is None else _rotation(angle)
    return None


def _rotation(angle: float) -> str | None:
    turned = angle % 360
    return f"rotate_{turned:.0f}" if turned in (90, 180, 270) else None


def _argument(node: ast.Call, position: int, keyword: str) -> ast.expr | None:
    named = [given.value for given in node.keywords if given.arg == keyword]
    return named[0] if named else node.args[position] if len(node.args) > position else None


def _value(node: ast.expr | None, reader: _Reader, default: float | None = None) -> float | None:
    return default if node is None else _number(node, reader)


def _named(node: ast.expr | None, names: dict[str, str], codes: dict[int, str], reader: _Reader) -> str | None:
    """Label of a constant of PIL or OpenCV, by its name or its number."""
    if isinstance(node, ast.Attribute):
        return names.get(node.attr)
    number = _value(node, reader)
    return None if number is None else codes.get(int(number))


def _add_crop(box: ast.expr | None, reader: _Reader) -> None:
    edges = None if box is None else _constant(box, reader)
    reader.labels.add("crop")
    if isinstance(edges, tuple) and len(edges) == 4:
        reader.boxes.append((edges[0], edges[1], edges[2], edges[3]))


def _add_enhancement(node: ast.Call, reader: _Reader) -> None:
    """`ImageEnhance.Contrast(image).enhance(1.5)`; a factor of 1 changes nothing."""
    maker = node.func.value if isinstance(node.func, ast.Attribute) else None
    factor = _value(_argument(node, 0, "factor"), reader)
    if isinstance(maker, ast.Call) and isinstance(maker.func, ast.Attribute) and factor not in (None, 1.0):
        kind = _ENHANCERS.get(maker.func.attr)
        reader.labels |= {f"{kind}_{'up' if (factor or 0) > 1 else 'down'}"} if kind else set()


def _read_slices(node: ast.Subscript, reader: _Reader) -> None:
    """`array[y1:y2, x1:x2]` is a crop, `array[::-1]` and `array[:, ::-1]` are flips."""
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    slices = [part for part in parts[:2] if isinstance(part, ast.Slice)]
    if len(slices) != len(parts[:2]) or not slices:
        return
    steps = [_value(part.step, reader, 1.0) for part in slices]
    for step, label in zip(steps, ("flip_vertical", "flip_horizontal"), strict=False):
        reader.labels |= {label} if step == -1.0 else set()
    if len(slices) == 2 and all(step == 1.0 for step in steps) and any(part.lower or part.upper for part in slices):
        (y1, y2), (x1, x2) = ((_value(p.lower, reader, 0.0), _value(p.upper, reader)) for p in slices)
        reader.labels.add("crop")
        if x1 is not None and y1 is not None and x2 is not None and y2 is not None:
            reader.boxes.append((x1, y1, x2, y2))
