"""What all parts of a request have in common: fields and values that change nothing are accepted, unknown fields refused."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

Values = dict[str, tuple[Any, ...]]

MAX_FIELDS = 100


class Accepting(BaseModel):
    """A part of a request, without its fields that change nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)
    changes_nothing: ClassVar[Values] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        names = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {
            name: value
            for name, value in given.items()
            if value is not None and (name in names or value not in cls.changes_nothing.get(name, ()))
        }
        if len(kept) > MAX_FIELDS:
            raise ValueError(f"{len(kept)} fields are given; at most {len(names)} are possible")
        return kept
