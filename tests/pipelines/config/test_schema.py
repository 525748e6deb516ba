import dataclasses

import pytest
import yaml
from pydantic import ValidationError

from kforcing.chunking import CHUNK
from pipelines.config.fingerprint import fingerprint, material
from pipelines.config.help import describe_fields
from pipelines.config.overrides import apply, override
from pipelines.config.recipes import RECIPES, recipe
from pipelines.config.schema import Config, TrainConfig
from pipelines.config.section import ConfigError
from pipelines.config.stages import resolve
from pipelines.config.validation import check_targets


def test_overrides_are_parsed_by_type():
    config = apply(
        recipe("smoke"),
        {"train": {"lr": 1}},
        [
            "train.steps=7",
            "rollout.cache=true",
            "teacher.path=none",
            "data.source=x y",
            "student.design.noise.max_cycles=8",
        ],
    )
    assert config.train.lr == 1.0
    assert type(config.train.lr) is float
    assert (config.train.steps, config.rollout.cache, config.teacher.path) == (7, True, None)
    assert (config.data.source, config.student.design.noise.max_cycles) == ("x y", 8.0)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.step=3", "unknown config key 'train.step'; did you mean 'train.steps'"),
        ("trian.steps=3", "did you mean 'train'"),
        ("train=3", "'train' is a section"),
        ("train.lr.x=3", "'train.lr' is a value, not a section"),
        ("train.steps=many", "train.steps=many: expected int, got str"),
        ("train.steps=1.5", "expected int, got float"),
        ("train.lr=fast", "expected float"),
        ("rollout.cache=3", "expected bool"),
        ("train.steps=[", "expected int"),
        ("recipe=smoke", "choose the recipe by --recipe smoke"),
        ("stages.k2.data.block=3", "a stage's exceptions are"),
        ("stages.k2.train.stepz=3", "did you mean 'stages.k2.train.steps'"),
        ("nothing", "overrides are written section.field=value"),
    ],
)
def test_mistakes_name_the_key_and_the_nearest_one(word, message):
    with pytest.raises(ConfigError, match=message):
        apply(recipe("smoke"), {}, [word])


def test_a_stage_has_its_own_exceptions():
    config = apply(recipe("smoke"), {}, ["stages.k2.train.steps=5", "stages.k2.targets=self", "train.steps=9"])
    _, two, four = resolve(config)
    assert (two.train.steps, two.targets) == (5, "self")
    assert (four.train.steps, four.targets) == (9, "ar")


def test_a_config_file_may_hold_exceptions_too(tmp_path):
    config = apply(recipe("smoke"), {"stages": {"k4": {"train": {"lr": 0.5}}}}, [])
    assert resolve(config)[-1].train.lr == 0.5


def test_runtime_fields_do_not_change_fingerprints():
    train = recipe("smoke").train
    same = dataclasses.replace(train, workers=7, log_every=1, max_failures=9)
    assert fingerprint(train) == fingerprint(same)
    assert fingerprint(train) != fingerprint(dataclasses.replace(train, lr=9.0))


def test_a_renamed_field_keeps_its_name_in_fingerprints():
    assert material(recipe("smoke").train)["own_windows"] == 0.0
    assert material(recipe("smoke").rollout)["top_m"] == 32
    assert "on_policy_fraction" not in material(recipe("smoke").train)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train.own_windows=0.5", "train.on_policy_fraction=0.5"),
        ("teacher.train.own_from=0.25", "teacher.train.on_policy_from=0.25"),
        ("stages.k4.rollout.top_m=none", "stages.k4.rollout.teacher_top_k=none"),
    ],
)
def test_an_old_key_works_with_one_warning_that_names_the_new_one(old, new, caplog):
    config = apply(recipe("smoke"), {}, [old])
    assert config == apply(recipe("smoke"), {}, [new])
    (old_key, value), new_key = old.split("="), new.split("=")[0]
    assert caplog.messages == [f"{old_key} is now {new_key}"]
    caplog.clear()
    *sections, field = old_key.split(".")
    tree = {field: yaml.safe_load(value) if value != "none" else None}
    for section in reversed(sections):
        tree = {section: tree}
    assert apply(recipe("smoke"), tree, []) == config
    assert caplog.messages == [f"{old_key} is now {new_key}"]


def test_ranges_hold_wherever_a_section_is_made():
    with pytest.raises(ValidationError, match="greater than 0"):
        dataclasses.replace(recipe("smoke").train, steps=0)
    with pytest.raises(ValidationError, match=r"lear_rate"):
        TrainConfig(lear_rate=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("smoke").train.steps = 3


def test_stages_double_up_to_k():
    assert override(recipe("smoke"), "student.k", 8).ks() == [1, 2, 4, 8]
    assert override(recipe("smoke"), "student.k", 1).ks() == [1]


def test_help_lists_every_field_with_its_docstring():
    text = describe_fields(Config)
    for field in (
        "data.source",
        "teacher.train.steps",
        "student.design.noise.max_cycles",
        "train.zero_stage",
        "eval.blocks",
    ):
        assert f"  {field}  [" in text
    assert "Optimiser steps." in text


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        recipe("quikstart")


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_consistent(name):
    config = recipe(name)
    assert config.recipe == name
    for stage in resolve(config):
        train = stage.train
        assert train.batch % (train.workers * train.micro_batch) == 0
        assert config.rollout.windows <= config.data.block


SEQUENTIAL = ("student.design.readout=sequential", "student.design.coupling=gumbel", "targets=ar", "loss=soft")
PAPER = ("student.design.readout=argmax", "student.design.coupling=inverse_cdf", "targets=self", "loss=hard")


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("words", [SEQUENTIAL, PAPER])
def test_every_recipe_takes_the_parts_of_either(name, words):
    config = apply(recipe(name), {}, words)
    config.student.design.check()
    for stage in resolve(config):
        check_targets(stage)


def test_parts_a_read_out_does_not_have_do_not_name_its_stages():
    words = ["student.design.noise.max_cycles=9", "student.design.sequential.hint_layers=1"]
    for parts, effect in ((SEQUENTIAL, "student.design.sequential.hint_layers=1"), (PAPER, words[0])):
        plain = apply(recipe("smoke"), {}, parts).student.design.effective()
        assert apply(recipe("smoke"), {}, [*parts, effect]).student.design.effective() != plain
        (idle,) = set(words) - {effect}
        assert apply(recipe("smoke"), {}, [*parts, idle]).student.design.effective() == plain


def test_the_papers_recipes_carry_the_papers_settings():
    for name, length in (("lm1b", 128), ("owt", 1024)):
        config = recipe(name)
        t = config.train
        assert (config.data.block, config.teacher.hidden, config.teacher.layers) == (length, 768, 12)
        assert (t.batch, t.lr, t.steps, t.ema, t.clip, t.eps) == (512, 1e-4, 500_000, 0.999, 1.0, 1e-6)
        assert (t.schedule, t.weight_decay, t.beta2) == ("constant", 0.0, 0.999)


def test_the_default_of_loss_chunk_is_the_one_of_the_losses():
    assert TrainConfig().loss_chunk == CHUNK
