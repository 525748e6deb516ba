"""Names of stages: a hash of everything that their result depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name work by its inputs; RUNTIME fields of dataclasses are left out."""
    text = json.dumps([material(part) for part in parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def material(part: Any) -> Any:
    """What is hashed of a value: a dataclass as a dictionary without its RUNTIME fields, anything else as it is."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = [f for f in dataclasses.fields(part) if not f.metadata.get("runtime")]
        return {f.name: material(getattr(part, f.name)) for f in fields}
    return part
