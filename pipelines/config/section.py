"""What sections of a config are made of: their error, their pydantic settings, and the types that hold ranges.

A section is a frozen pydantic dataclass with one docstring a field:

    @dataclass(frozen=True, config=SECTION)          # pydantic.dataclasses.dataclass
    class SpeedConfig:
        rounds: Annotated[Count, RUNTIME] = 5
        '''Measurements of each batch, of which the median counts.'''

Every construction checks types and ranges, and so does `dataclasses.replace`. A field marked RUNTIME says where or how
visibly work runs, not what it computes; it stays out of the hashes that name stages, so changing it never reruns anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from pipelines.failures import Exit, Failure
from pipelines.log import without_passwords


class ConfigError(Failure, ValueError):
    """A mistake of the person who started the run; its text, one line, names the value and what to do."""

    exit_code = Exit.CONFIG


SECTION = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

RUNTIME = {"runtime": True}
"""Marks a field that has no effect on results, in `Annotated[…, RUNTIME]`."""


ADDED = {"added": True}
"""Marks a field that earlier releases did not have, in `Annotated[…, ADDED]`: fingerprints leave its default value out."""


@dataclass(frozen=True)
class Formerly:
    """Marks a renamed field, in `Annotated[…, Formerly("old_name")]`: fingerprints keep the old name."""

    name: str


def refuse_passwords(fields: Iterable[tuple[str, Any]]) -> None:
    """Raise ConfigError for a field whose value is a URI with a password or another secret: configs are logged and saved."""
    for name, value in fields:
        if isinstance(value, str) and without_passwords(value) != value:
            raise ConfigError(
                f"{name}={without_passwords(value)} holds a password or another secret, which would be saved and logged; "
                "give it in the environment, for example in MLFLOW_TRACKING_URI, MLFLOW_TRACKING_PASSWORD or "
                "AWS_SECRET_ACCESS_KEY"
            )


def _label(text: str) -> str:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError("must be written key=value, as given to `ray start --labels`")
    return text


Count = Annotated[int, Field(gt=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NodeLabel = Annotated[str, AfterValidator(_label)]
"""A `key=value` label of cluster nodes."""


def node_selector(label: str | None) -> dict[str, str] | None:
    """A `key=value` label as Ray's label selector."""
    return None if label is None else dict([label.split("=", 1)])
