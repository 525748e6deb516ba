"""The names of registered models: `models:/NAME@ALIAS` and `models:/NAME/VERSION`."""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = "models:/"


class ModelUri(NamedTuple):
    """A registered model, and which version of it. Exactly one of `alias` and `version` is given."""

    name: str
    alias: str | None
    version: str | None


def parse_model_uri(uri: str) -> ModelUri:
    """Split the URI of a registered model. Raises ValueError that shows the accepted forms."""
    found = re.fullmatch(r"models:/([^@/]+)(?:@([^@/]+)|/(\d+))", uri)
    if not found:
        raise ValueError(f"{uri} names no registered model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    return ModelUri(*found.groups())
