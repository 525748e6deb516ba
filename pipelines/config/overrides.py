"""Changing single fields of a config: `section.field=value` words and config files."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipelines.config.section import ConfigError
from pipelines.log import log

RENAMED = {
    "train.own_windows": "train.on_policy_fraction",
    "train.own_from": "train.on_policy_from",
    "rollout.top_m": "rollout.teacher_top_k",
    "rivals": "baselines",
}
"""Old key → new key, as parts of a dotted path. The old ones still work, with a warning."""


def current_name(path: str) -> str:
    """A dotted path with renamed keys replaced by their new names."""
    for old, new in RENAMED.items():
        path = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", path)
    return path


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested dictionary as (dotted path, value) pairs."""
    pairs = []
    for key, value in tree.items():
        pairs += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def override(config: Any, path: str, value: Any) -> Any:
    """A copy of a section with one dotted field set; strings are parsed by the field's type.

    Raises ConfigError for an unknown key (naming the nearest one), a value of the wrong type, or one out of range.
    """
    return _set(config, path, value, path)


def _set(config: Any, path: str, value: Any, whole: str) -> Any:
    """`whole` is the path from the top of the config, for messages; `path` is the part of it that begins here."""
    new = current_name(path)
    if new != path:
        whole_new = whole.removesuffix(path) + new
        log.warning(f"{whole} is now {whole_new}")
        path, whole = new, whole_new
    head, _, rest = path.partition(".")
    _check_key(config, head, path, value, whole)
    if head == "stages":
        return dataclasses.replace(config, stages=_with_exception(config, rest, value, whole))
    kind = typing.get_type_hints(type(config))[head]
    if dataclasses.is_dataclass(kind):
        if rest:
            child = _set(getattr(config, head), rest, value, whole)
        else:
            return _set_section(config, kind, path, value, whole)
    elif rest:
        raise ConfigError(f"{whole!r}: {whole.removesuffix('.' + rest)!r} is a value, not a section")
    else:
        child = _parse(value, kind, whole)
    try:
        return dataclasses.replace(config, **{head: child})
    except ValidationError as error:
        raise ConfigError(f"{whole}={child}{_problem(error, kind)}") from None
    except ValueError as error:
        raise ConfigError(f"{whole}={value}: {error}") from None


def _check_key(config: Any, head: str, path: str, value: Any, whole: str) -> None:
    if whole == "recipe":
        raise ConfigError(f"recipe={value}: choose the recipe by --recipe {value}, or by `recipe:` in a config file")
    names = [f.name for f in dataclasses.fields(config)]
    if head not in names:
        near = difflib.get_close_matches(head, names, 1)
        hint = f"did you mean {whole.removesuffix(path) + near[0]!r}?" if near else f"known here: {', '.join(names)}"
        raise ConfigError(f"unknown config key {whole!r}; {hint}")


def _set_section(config: Any, kind: Any, path: str, value: Any, whole: str) -> Any:
    if not isinstance(value, dict):
        first = dataclasses.fields(kind)[0].name
        raise ConfigError(f"{whole!r} is a section; set its fields, for example {whole}.{first}=…")
    for key, item in value.items():
        config = _set(config, f"{path}.{key}", item, f"{whole}.{key}")
    return config


def _with_exception(config: Any, rest: str, value: Any, whole: str) -> dict[str, dict[str, Any]]:
    """`config.stages` with one more exception for a stage, which has been parsed as the field that it replaces."""
    if not rest:
        if not isinstance(value, dict):
            raise ConfigError(f"{whole!r} is a section; write for example stages.k4.train.steps=2000")
        for path, item in leaves(value):
            config = override(config, f"stages.{path}", item)
        return config.stages
    name, _, path = rest.partition(".")
    if path.partition(".")[0] not in ("train", "rollout", "targets", "loss"):
        raise ConfigError(f"{whole!r}: a stage's exceptions are stages.{name}.train.…, .rollout.…, .targets or .loss")
    parsed = _set(config, path, value, whole)
    for part in path.split("."):
        parsed = getattr(parsed, part)
    return {**config.stages, name: {**config.stages.get(name, {}), path: parsed}}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union type, or the type alone."""
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _parse(value: Any, kind: Any, whole: str) -> Any:
    options = tuple(type(_choices(option)[0]) if _choices(option) else option for option in alternatives(kind))
    if isinstance(value, str):
        if types.NoneType in options and value.lower() in ("none", "null", ""):
            return None
        if str in options:
            return value
        try:
            value = float(value) if float in options else yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            raise ConfigError(f"{whole}={value}: expected {_name(options)}") from None
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in options:
        raise ConfigError(f"{whole}={value}: expected {_name(options)}, got {type(value).__name__}")
    return value


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _name(options: tuple[Any, ...]) -> str:
    return " or ".join("none" if option is types.NoneType else option.__name__ for option in options)


def _problem(error: ValidationError, kind: Any) -> str:
    """What is wrong with a value, as the end of a sentence that begins with `field=value`."""
    first = error.errors()[0]
    context = first.get("ctx", {})
    if first["type"] == "literal_error":
        choices = [str(choice) for option in alternatives(kind) for choice in _choices(option)]
        return f": choose one of {', '.join(choices)}"
    if first["type"] == "value_error":
        return f" {context['error']}"
    if context.get("gt") == 0:
        return " must be positive"
    return f" {first['msg'].replace('Input should be', 'must be')}"


def load_file(path: str | Path) -> dict[str, Any]:
    """A config file (YAML or JSON) as a nested dictionary."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML or JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold a mapping of sections, found {type(tree).__name__}")
    return tree


def apply(config: Any, tree: dict[str, Any], words: Sequence[str]) -> Any:
    """Apply a config file's tree, then `section.field=value` words."""
    for path, value in leaves(tree):
        config = override(config, path, value)
    for word in words:
        path, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"cannot read {word!r}; overrides are written section.field=value")
        config = override(config, path, value)
    return config
