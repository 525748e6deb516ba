"""The command line of a run: `[--recipe NAME | --config FILE] [section.field=value …]`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from pipelines.config.help import describe_fields
from pipelines.config.overrides import apply, load_file
from pipelines.config.recipes import RECIPES, recipe
from pipelines.config.schema import Config
from pipelines.config.validation import validate
from pipelines.runs.cluster import with_lasting_root


def read_command_line(description: str, words: list[str] | None = None, defaults: Sequence[str] = ()) -> Config:
    """Words of the command line → a validated config. Raises ConfigError.

    `defaults` are overrides that come before the file and the words.
    """
    options = _parser(description).parse_intermixed_args(words)
    tree = load_file(options.config) if options.config else {}
    named = tree.pop("recipe", None)
    start = apply(recipe(options.recipe or named or "quickstart"), {}, defaults)
    config = with_lasting_root(apply(start, tree, options.overrides), remote=True)
    # A recipe's exceptions for stages that this run does not train are not the user's mistake.
    learning = [f"k{k}" for k in config.ks() if config.student.design.learns(k)]
    kept = {n: s for n, s in config.stages.items() if n in learning or s != start.stages.get(n)}
    config = dataclasses.replace(config, stages=kept)
    validate(config)
    return config


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"recipes: {', '.join(RECIPES)}\n\nfields:\n{describe_fields(Config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", metavar="NAME", help="starting point (default: quickstart)")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with `recipe` and sections of fields")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser
