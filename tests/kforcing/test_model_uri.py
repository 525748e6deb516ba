import pytest

from kforcing.model_uri import ModelUri, parse_model_uri


def test_both_forms_are_split_into_name_and_version_or_alias():
    assert parse_model_uri("models:/kforcing-hf@k4") == ModelUri("kforcing-hf", "k4", None)
    assert parse_model_uri("models:/kforcing-hf/3") == ModelUri("kforcing-hf", None, "3")


@pytest.mark.parametrize(
    "uri", ["models:/a", "models:/a@", "models:/a@b/2", "models:/a/latest", "models:/a/b/2", "runs:/a/2"]
)
def test_other_forms_are_refused_with_the_accepted_ones(uri):
    with pytest.raises(
        ValueError, match=f"{uri} names no registered model; write models:/NAME@ALIAS or models:/NAME/VERSION"
    ):
        parse_model_uri(uri)
