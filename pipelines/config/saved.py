"""`config.yaml` of a run directory: the resolved config, every field of every section, and the name of its recipe.

`pipelines/distill.py --config RUN/config.yaml` takes the file, and an evaluation reads it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from pipelines.config.overrides import apply, load_file
from pipelines.config.schema import Config
from pipelines.config.section import ConfigError
from pipelines.files import atomic_write

CONFIG_FILE = "config.yaml"


def save_config(config: Config) -> None:
    """Write the config to its run directory, atomically.

    The first line is `---` and the last one `...`, so that a file that was cut does not read as a shorter config.
    """
    tree = dataclasses.asdict(config)
    atomic_write(
        config.root / CONFIG_FILE, yaml.safe_dump(tree, sort_keys=False, explicit_start=True, explicit_end=True)
    )


def load_config(file: Path) -> Config:
    """The config that `save_config` wrote. Raises ConfigError for a file that is missing, cut, or of another release.

    The file holds every field, so it does not depend on what this release's recipe of the same name says.
    """
    text = file.read_bytes() if file.is_file() else b"none"
    if not text or (text.startswith(b"---") and not text.endswith(b"...\n")):
        raise ConfigError(f"{file} is empty or cut; run pipelines/distill.py once more with the settings of the run")
    tree = load_file(file)
    name = tree.pop("recipe", None)
    if not isinstance(name, str):
        raise ConfigError(f"{file}: recipe={name!r}; a saved config names the recipe that it started from")
    try:
        return apply(Config(name), tree, ())
    except ConfigError as error:
        raise ConfigError(f"{file} was written by another release: {error}") from None
