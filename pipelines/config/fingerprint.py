"""Names of stages: a hash of everything that their result depends on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from typing import Any

from pipelines.config.section import ADDED, RUNTIME, Formerly

_NOTHING = object()


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name work by its inputs; RUNTIME fields of dataclasses are left out."""
    text = json.dumps([material(part) for part in parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def material(part: Any) -> Any:
    """What is hashed of a value: a dataclass as a dictionary without its RUNTIME fields, anything else as it is.

    A renamed field goes by its former name and an added one is left out where it has its default value, so that work of
    earlier releases keeps its own name.
    """
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        values = [
            (name, getattr(part, field), default) for field, (name, default) in _hashed_fields(type(part)).items()
        ]
        return {name: material(value) for name, value, default in values if value != default}
    return part


@functools.cache
def _hashed_fields(section: type) -> dict[str, tuple[str, Any]]:
    """Field → the name that it is hashed under, and the value that is left out."""
    hints = typing.get_type_hints(section, include_extras=True)
    names = {}
    for field in dataclasses.fields(section):
        marks = getattr(hints[field.name], "__metadata__", ())
        if RUNTIME in marks:
            continue
        name = next((mark.name for mark in marks if isinstance(mark, Formerly)), field.name)
        names[field.name] = name, field.default if ADDED in marks else _NOTHING
    return names
