"""Random JSON schemas whose documents are short."""

import random


def schema(rng: random.Random, depth: int = 2) -> dict:
    """A schema of an object, with up to `depth` levels of objects and lists below it."""
    names = rng.sample(["id", "name", "tags", "é", "is ok", "x-y", "list"], rng.randint(1, 3))
    properties = {name: _value(rng, depth) for name in names}
    required = names if rng.random() < 0.7 else names[:1]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(rng: random.Random, depth: int) -> dict:
    kinds = ["string", "integer", "boolean", "enum", "const", "null", "pattern", "either"]
    kind = rng.choice(kinds + ["object", "array"] * (depth > 0))
    if kind == "object":
        return schema(rng, depth - 1)
    if kind == "array":
        return {"type": "array", "items": _value(rng, depth - 1), "minItems": rng.randint(0, 1), "maxItems": 2}
    if kind == "either":
        return {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]}
    low = rng.randint(-20, 20)
    return {
        "string": {"type": "string", "maxLength": rng.randint(1, 6)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)},
        "boolean": {"type": "boolean"},
        "enum": {"enum": rng.sample(["red", "green", 'b"l', 1, 2.5, None], 3)},
        "const": {"const": rng.choice(["a", 0, False])},
        "null": {"type": "null"},
        "pattern": {"type": "string", "pattern": "^[a-c]{2}-[0-9]{1,3}$"},
    }[kind]
