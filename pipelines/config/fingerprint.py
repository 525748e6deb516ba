"""Names of stages: a hash of everything that their result depends on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from typing import Any

from pipelines.config.section import RUNTIME, Formerly


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name work by its inputs; RUNTIME fields of dataclasses are left out."""
    text = json.dumps([material(part) for part in parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def material(part: Any) -> Any:
    """What is hashed of a value: a dataclass as a dictionary without its RUNTIME fields, anything else as it is.

    A renamed field goes by its former name, so that work of earlier releases keeps its own.
    """
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return {name: material(getattr(part, field)) for field, name in _hashed_fields(type(part)).items()}
    return part


@functools.cache
def _hashed_fields(section: type) -> dict[str, str]:
    """Field → the name that it is hashed under."""
    hints = typing.get_type_hints(section, include_extras=True)
    names = {}
    for field in dataclasses.fields(section):
        marks = getattr(hints[field.name], "__metadata__", ())
        if RUNTIME in marks or field.metadata.get("runtime"):
            continue
        names[field.name] = next((mark.name for mark in marks if isinstance(mark, Formerly)), field.name)
    return names
