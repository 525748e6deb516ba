"""The names of registered models: `models:/NAME@ALIAS` and `models:/NAME/VERSION`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

PREFIX = "models:/"


class ModelUri(NamedTuple):
    """A registered model, and which version of it. Exactly one of `alias` and `version` is given."""

    name: str
    alias: str | None
    version: str | None


def check_path(uri: str) -> None:
    """Raise ValueError when a part of a URI's path is `..`, also in its percent-encoded forms."""
    decoded = uri
    while (once := unquote(decoded)) != decoded:
        decoded = once
    if ".." in re.split(r"[/\\]", decoded):
        raise ValueError(f"{uri} leads out of its folder by `..`; give the path itself")


def refuse_links(folder: Path) -> None:
    """Raise ValueError when a folder that was downloaded holds a symbolic link, which could lead to any file of this node."""
    if link := next((file for file in sorted(folder.rglob("*")) if file.is_symlink()), None):
        raise ValueError(
            f"{link} is a symbolic link, and models that are downloaded have none; register the files themselves"
        )


def parse_model_uri(uri: str) -> ModelUri:
    """Split the URI of a registered model. Raises ValueError that shows the accepted forms."""
    found = re.fullmatch(r"models:/([^@/]+)(?:@([^@/]+)|/(\d+))", uri)
    if not found or found[1] in (".", ".."):
        raise ValueError(f"{uri} names no registered model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    return ModelUri(*found.groups())
