"""Arguments by JSON schema: their description for the policy, and the check of a call's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import extend

from cv_lightning.tools.base import Tool

KINDS = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}
"""Texts for types of JSON schema in errors."""
MAX_DETAIL = 200
"""Maximum characters of a validator's message."""


def _is_integer(checker: object, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # 2.0 is an integer of JSON schema, not of Python


_Validator = extend(
    Draft202012Validator, type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer)
)


def check_tools(tools: Sequence[Tool]) -> None:
    """Refuse tools that cannot be offered together.

    Raises:
        ValueError: A name is not valid or occurs twice, or a schema is not valid.
    """
    names = [tool.name for tool in tools]
    for tool in tools:
        kind = type(tool).__qualname__
        if not tool.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"agent.tools: {kind}.name {tool.name!r} must be letters, digits, _ and -")
        if names.count(tool.name) > 1:
            raise ValueError(
                f"agent.tools: {names.count(tool.name)} tools have the name {tool.name!r}; give each its own"
            )
        try:
            _Validator.check_schema(tool.parameters)
        except SchemaError as error:
            raise ValueError(f"agent.tools: {kind}.parameters is not a JSON schema: {error.message}") from error
        if tool.parameters.get("type") != "object" or not isinstance(tool.parameters.get("properties"), Mapping):
            raise ValueError(f'agent.tools: {kind}.parameters must have "type": "object" and "properties"')


def describe_arguments(parameters: Mapping[str, Any]) -> str:
    """One line per argument, for the system prompt."""
    required = parameters.get("required", ())
    lines = []
    for name, schema in parameters["properties"].items():
        kind = schema.get("type", "any")
        kind = " or ".join(kind) if isinstance(kind, list) else kind
        optional = "" if name in required else ", optional"
        choices = f" One of {', '.join(map(repr, schema['enum']))}." if "enum" in schema else ""
        lines.append(f"- `{name}` ({kind}{optional}): {schema.get('description', '')}{choices}".rstrip(" :"))
    return "\n".join(lines)


def example_arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The required arguments, each with an example, its default or an empty value of its type."""
    empty = {"string": "...", "integer": 0, "number": 0.0, "boolean": True, "array": [], "object": {}}
    values = {}
    for name, schema in parameters["properties"].items():
        if name in parameters.get("required", ()):
            examples = [*schema.get("examples", ()), *schema.get("enum", ())]
            values[name] = examples[0] if examples else schema.get("default", empty.get(schema.get("type", "")))
    return values


def read_arguments(parameters: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Check arguments against a schema.

    An integer may be given as text. Arguments that the schema does not know are dropped, unless it allows them.

    Returns:
        The arguments with defaults filled in, and an error for the model.
    """
    validator, required = _Validator(parameters), parameters.get("required", ())
    values = dict(given) if parameters.get("additionalProperties") else {}
    for name, schema in parameters["properties"].items():
        if name not in given and ("default" in schema or name not in required):
            values |= {name: schema["default"]} if "default" in schema else {}
            continue
        value = values[name] = _converted(given.get(name), schema)
        error = best_match(validator.evolve(schema=schema).iter_errors(value)) if name in given else None
        if error is None and name in given:
            continue
        is_said = error is None or (error.validator in ("type", "pattern") and not error.path)  # by `_kind`
        detail = "" if is_said or error is None else f": {error.message[:MAX_DETAIL]}"
        if name in required and "default" not in schema:
            return {}, f'"arguments" needs "{name}": {_kind(schema)}{detail}'
        return {}, f'"{name}" must be {_kind(schema)}{detail}'
    whole = best_match(validator.iter_errors(values))
    return ({}, f'"arguments": {whole.message[:MAX_DETAIL]}') if whole is not None else (values, None)


def _kind(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    media = " of Python" if schema.get("contentMediaType") == "text/x-python" else ""
    return (" or ".join(KINDS.get(kind, "null") for kind in kinds) or "a value that fits the schema") + media


def _converted(value: Any, schema: Mapping[str, Any]) -> Any:
    is_digits = isinstance(value, str) and value.strip().isdecimal() and len(value) < 10
    return int(value) if is_digits and schema.get("type") == "integer" else value
