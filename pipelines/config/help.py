"""The text of `--help`: every field of a config with its type and docstring."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import types
import typing
from typing import Any

from pipelines.config.overrides import alternatives


def describe_fields(cls: Any, prefix: str = "") -> str:
    """A line for every `section.field` below a section class; docstrings are read from the source."""
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    kinds = typing.get_type_hints(cls)
    lines = []
    for statement, after in itertools.pairwise(body):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = ast.unparse(statement.target)
        if dataclasses.is_dataclass(kinds[name]):
            lines.append(describe_fields(kinds[name], f"{prefix}{name}."))
        else:
            doc = " ".join(ast.literal_eval(after.value).split())  # type: ignore[attr-defined]
            lines.append(f"  {prefix}{name}  [{_type_name(kinds[name])}]  {doc}")
    return "\n".join(lines)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    options = alternatives(kind)
    if len(options) > 1:
        return " | ".join(map(_type_name, options))
    if kind is types.NoneType:
        return "none"
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
