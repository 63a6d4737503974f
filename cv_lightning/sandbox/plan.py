"""The plan executor: straight-line code of known operations, executed without running model code.

A snippet is a plan only if every statement is an assignment of numbers, tuples of numbers and chains of known Pillow
calls. Its numbers and sizes are computed and its cost is estimated before a pixel is touched (`prepare`); then its
operations are called with checked arguments (`execute`). Nothing else of the snippet is ever evaluated. Code that is
not on the lists, or fails, runs in a child, so that errors read the same.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from cv_lightning.images import compose, is_usable_size, to_rgb
from cv_lightning.sandbox import plan_rules as rules
from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.effect import Found, checked_operations, effect_of, net_effect
from cv_lightning.sandbox.geometry import SILENT, Size, describe, filter_arguments
from cv_lightning.sandbox.plan_rules import NotPlannable, in_range
from cv_lightning.sandbox.wire import Trace
from cv_lightning.types import IDENTITY, Affine, Operation, SandboxResult, ToolStatus

MAX_STATEMENTS = 24
RESERVED = {*rules.MODULES, "PIL", "np", "numpy", "cv2", "draw", *rules.FUNCTIONS}
ALLOWED_NODES = (
    ast.Name, ast.Constant, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp, ast.Call, ast.Attribute, ast.keyword,
    ast.IfExp, ast.Compare, ast.cmpop, ast.Load, ast.Store, ast.operator, ast.USub, ast.Subscript, ast.Assign,
)  # fmt: skip
FAILURES = (
    ArithmeticError, ValueError, TypeError, OSError, LookupError, MemoryError, SystemError, AttributeError,
    RecursionError,
)  # fmt: skip
"""What preparing or executing a plan may raise (deep nesting included); a child then reports the error."""
RESULT_NAMES = ("result", "output", "processed_image", "image", "img")
"""The order in which a child looks for the result; the last two count only if they were assigned again."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation with checked arguments."""

    call: str
    source: int
    """What it is called on: 0 for the input, else the number of a step, from 1."""
    arguments: dict[str, Any]
    size: Size
    """Size of its result."""


@dataclass(frozen=True, slots=True)
class SnippetPlan:
    """Checked operations, ready to run."""

    steps: tuple[Step, ...]
    result: int
    """Number of the step that makes the result; 0: the input."""
    cost_ms: float
    size: Size
    """Size of the result."""


@dataclass(frozen=True, slots=True, eq=False)
class _Planned:
    """An image that does not exist yet: the step that will make it, and its size."""

    step: int
    size: Size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]


@dataclass(frozen=True, slots=True)
class _Enhancer:
    """`ImageEnhance.Contrast(image)` before `.enhance(factor)`."""

    call: str
    source: _Planned


# ------------------------------------------------------------------------------------------------ parsing
@lru_cache(maxsize=2048)
def parse_plan(code: str) -> tuple[tuple[ast.Assign, ...], dict[str, str]] | None:
    """The assignments of a snippet that may be a plan, with the names it imports; None if it is not one."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    imported: dict[str, str] = {}
    assignments = []
    for statement in body:
        node = _as_assignment(statement)
        if isinstance(node, ast.Assign) and _is_simple(node):
            assignments.append(node)
        elif not _is_known_import(node, imported):
            return None
    return (tuple(assignments), imported) if 0 < len(assignments) <= MAX_STATEMENTS else None


def _as_assignment(node: ast.stmt) -> ast.stmt:
    """`x += 1` as `x = x + 1`, which is the same for numbers."""
    if not isinstance(node, ast.AugAssign) or not isinstance(node.target, ast.Name):
        return node
    sum_ = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
    return ast.Assign([ast.Name(node.target.id, ast.Store())], sum_)


def _is_known_import(node: ast.stmt, imported: dict[str, str]) -> bool:
    """True for an import of known names under their usual name; adds `mirror: ImageOps.mirror` to `imported`."""
    if isinstance(node, ast.ImportFrom):
        if any(alias.asname is not None for alias in node.names) or node.level:
            return False
        names = {alias.name for alias in node.names}
        if node.module == "PIL":
            return names <= set(rules.MODULES)
        module = (node.module or "").removeprefix("PIL.")
        if node.module != f"PIL.{module}" or not names <= rules.IMPORTABLE.get(module, frozenset()):
            return False
        imported.update({name: f"{module}.{name}" for name in names})
        return True
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


# ------------------------------------------------------------------------------------------------ preparing
class _Builder:
    """Follows the values of the names through a snippet and collects the steps."""

    def __init__(self, size: Size, imported: dict[str, str]) -> None:
        self.start = _Planned(0, size)
        self.names: dict[str, Any] = {"image": self.start, "img": self.start}
        self.imported = imported
        self.steps: list[Step] = []
        self.cost = 0.0

    def assign(self, node: ast.Assign) -> None:
        target, value = node.targets[0], self.value(node.value)
        if isinstance(target, ast.Name):
            self._bind(target.id, value)
            return
        names = [name.id for name in getattr(target, "elts", ()) if isinstance(name, ast.Name)]
        if not isinstance(value, tuple) or len(value) != len(names):
            raise NotPlannable("unpacking")
        for name, item in zip(names, value, strict=True):
            self._bind(name, item)

    def _bind(self, name: str, value: Any) -> None:
        if name in self.imported:
            raise NotPlannable("an imported name is assigned again")
        self.names[name] = value

    def result(self) -> _Planned:
        """The image that a child would return."""
        for name in RESULT_NAMES:
            value = self.names.get(name)
            if value is not None and (value is not self.start or name in ("result", "output")):
                if isinstance(value, _Planned):
                    return value
                break
        raise NotPlannable("the result is not an image")

    # -------------------------------------------------------------------------------------------- values
    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value if node.value is None or isinstance(node.value, bool | str) else in_range(node.value)
        if isinstance(node, ast.Name):
            if node.id not in self.names:
                raise NotPlannable(node.id)
            return self.names[node.id]
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self._number(element) for element in node.elts)
        if isinstance(node, ast.BinOp) and type(node.op) in rules.ARITHMETIC:
            return in_range(rules.ARITHMETIC[type(node.op)](self._number(node.left), self._number(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._number(node.operand)
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self._holds(node.test) else node.orelse)
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

    def _holds(self, test: ast.expr) -> bool:
        if not isinstance(test, ast.Compare) or len(test.ops) != 1 or type(test.ops[0]) not in rules.COMPARISONS:
            raise NotPlannable("condition")
        compare = rules.COMPARISONS[type(test.ops[0])]
        return bool(compare(self._number(test.left), self._number(test.comparators[0])))

    def _dotted(self, node: ast.expr) -> str:
        """`ImageOps.mirror` for that or an imported `mirror`; empty if the first name is a value of the snippet."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.names:
            return ""
        return ".".join([self.imported.get(node.id, node.id), *reversed(parts)])

    def _attribute(self, node: ast.Attribute) -> Any:
        dotted = self._dotted(node)
        if dotted in rules.CONSTANTS:
            return rules.CONSTANTS[dotted]
        if node.attr in ("size", "width", "height"):
            owner = self.value(node.value)
            if isinstance(owner, _Planned):
                return getattr(owner, node.attr)
        raise NotPlannable(node.attr)

    # -------------------------------------------------------------------------------------------- calls
    def _call(self, node: ast.Call) -> Any:
        args = [self.value(argument) for argument in node.args]
        kwargs = {keyword.arg or "**": self.value(keyword.value) for keyword in node.keywords}
        dotted = self._dotted(node.func)
        module, _, name = dotted.rpartition(".")
        if dotted in rules.FUNCTIONS and args and not kwargs and all(type(value) in (int, float) for value in args):
            return in_range(rules.FUNCTIONS[dotted](*args))
        if module == "ImageFilter" and name in rules.FILTER_CLASSES:
            return rules.make_filter(name, _named(rules.FILTER_CLASSES[name], args, kwargs))
        if module in ("ImageOps", "ImageEnhance") and dotted in rules.OPERATIONS:
            if not args or not isinstance(args[0], _Planned):
                raise NotPlannable(dotted)
            if module == "ImageOps":
                return self._operate(dotted, args[0], args[1:], kwargs)
            if len(args) == 1 and not kwargs:
                return _Enhancer(dotted, args[0])
        elif isinstance(node.func, ast.Attribute) and not dotted:
            owner, name = self.value(node.func.value), node.func.attr
            if isinstance(owner, _Enhancer) and name == "enhance":
                return self._operate(owner.call, owner.source, args, kwargs)
            if isinstance(owner, _Planned) and f"Image.{name}" in rules.OPERATIONS:
                return self._operate(f"Image.{name}", owner, args, kwargs)
        raise NotPlannable(dotted or "a call")

    def _operate(self, call: str, source: _Planned, args: list[Any], kwargs: dict[str, Any]) -> _Planned:
        arguments = _named(rules.OPERATIONS[call], args, kwargs)
        size = rules.output_size(call, source.size, arguments)
        self.cost += rules.cost_ms(call, source.size, size, arguments)
        self.steps.append(Step(call, source.step, arguments, size))
        return _Planned(len(self.steps), size)


def _named(names: tuple[str, ...], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(names) or not set(kwargs) <= set(names[len(args) :]):
        raise NotPlannable("arguments")
    return {**dict(zip(names, args, strict=False)), **kwargs}


@lru_cache(maxsize=1024)
def prepare(code: str, size: Size) -> SnippetPlan | None:
    """The plan of a snippet for an RGB input of `size` (width, height); None if the snippet is not a plan.

    No pixel is touched; every argument is checked, and sizes, radii and kernels are capped.
    """
    parsed = parse_plan(code)
    if parsed is None:
        return None
    builder = _Builder(size, parsed[1])
    try:
        for node in parsed[0]:
            builder.assign(node)
        result = builder.result()
    except (NotPlannable, *FAILURES):
        return None
    return SnippetPlan(tuple(builder.steps), result.step, builder.cost, result.size)


# ------------------------------------------------------------------------------------------------ executing
def execute(plan: SnippetPlan, image: Image.Image) -> tuple[Image.Image, Trace]:
    """Run a plan.

    Returns:
        The result as RGB (the input itself where nothing changed it), and its trace.

    Raises:
        NotPlannable: An operation gave another size than `output_size` predicted.
        FAILURES: An operation did not accept its arguments.
    """
    made: list[tuple[Image.Image, Affine | None, frozenset[int]]] = [(image, IDENTITY, frozenset())]
    """Of the input and of each step: the image, its map to the input, and the operations that it went through."""
    operations: list[Operation] = []
    for step in plan.steps:
        source, to_input, lineage = made[step.source]
        result = _apply(step, source)
        if result.size != step.size:
            raise NotPlannable(f"{step.call} gave {result.size} where {step.size} was expected")
        arguments = _plain(step.arguments)
        name, move = describe(step.call, arguments, source.size, result.size)
        if name not in SILENT:
            lineage |= {len(operations)}
            operations.append(
                Operation(
                    name=name, call=step.call, arguments=arguments, input_size=source.size, output_size=result.size
                )
            )
        known = compose(to_input, move) if to_input is not None and move is not None else None
        made.append((result, known, lineage))
    result, to_input, lineage = made[plan.result]
    told = tuple(replace(operation, used=i in lineage) for i, operation in enumerate(operations))
    return to_rgb(result), Trace(told, () if to_input is None else (to_input,), to_input is not None)


def _apply(step: Step, image: Image.Image) -> Image.Image:
    module, _, name = step.call.partition(".")
    made: Image.Image
    if module == "ImageEnhance":
        made = getattr(ImageEnhance, name)(image).enhance(step.arguments["factor"])
    else:
        owner = ImageOps if module == "ImageOps" else Image.Image
        made = getattr(owner, name)(image, **step.arguments)
    return made


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as the tracer reports them: a filter by its name and settings, constants of Pillow as numbers."""
    if "filter" in arguments:
        return filter_arguments(arguments["filter"])
    return {k: int(v) if isinstance(v, Image.Transpose | Image.Resampling) else v for k, v in arguments.items()}


def _moves_only(step: Step, size: Size) -> bool:
    """True if every pixel of an operation's result is a pixel of its source, and no other."""
    if step.call == "Image.crop":
        left, top, right, bottom = map(round, step.arguments["box"])
        return bool(left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1])
    if step.call == "Image.rotate":
        angle, square = step.arguments["angle"] % 360, size[0] == size[1]
        return bool(angle in (0, 180) or (angle in (90, 270) and (square or step.arguments.get("expand"))))
    return step.call in ("Image.transpose", "Image.copy", "ImageOps.mirror", "ImageOps.flip", "ImageOps.crop")


def run(image: Image.Image, code: str, config: SandboxConfig) -> SandboxResult | None:
    """Execute a snippet as a plan in this process.

    Args:
        image: The input, RGB; not changed.
        code: The snippet.
        config: Limits of time and of the result's size.

    Returns:
        None where the snippet is not a plan, costs more than `plan_budget_ms`, or fails; a child then runs it.
    """
    started = time.perf_counter()
    plan = prepare(code, image.size) if image.mode == "RGB" else None
    if plan is None or plan.cost_ms > config.plan_budget_ms:
        return None
    if not is_usable_size(*plan.size) or plan.size[0] * plan.size[1] > config.max_result_pixels:
        return None
    try:
        result, trace = execute(plan, image)
    except (NotPlannable, *FAILURES):
        return None
    sizes = [image.size, *(step.size for step in plan.steps)]
    if trace.claims and all(_moves_only(step, sizes[step.source]) for step in plan.steps):
        # Model code cannot forge the map of a plan: the proof could not fail, so no pixel is compared.
        found = Found(effect_of(trace.claims[0], image.size, plan.size), same_pixels=True)
    else:
        found = net_effect(trace.claims, image, result, direct=trace.direct)
    return SandboxResult(
        status=ToolStatus.OK,
        image=result.copy() if result is image else result,
        operations=checked_operations(trace.operations, found),
        effect=found.effect,
        executor="plan",
        elapsed_s=time.perf_counter() - started,
    )
