"""The form of an answer as clients ask for it: OpenAI's `response_format`, vLLM's `structured_outputs` and their elders."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from kforcing.structured import StructuredOutputs
from serve.protocol.accepting import Accepting
from serve.protocol.errors import ApiError

Source = Annotated[str, StringConstraints(min_length=1, max_length=100_000)]
Schema = dict[str, Any] | Source
Choices = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=10_000)]], Field(min_length=1, max_length=1000)
]


class NamedSchema(Accepting):
    """A JSON schema in the shape of OpenAI."""

    name: str | None = None
    """Accepted and not used."""
    description: str | None = None
    """Accepted and not used."""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Accepted and not used: the schema always holds."""


class ResponseFormat(Accepting):
    """`text` for no form, `json_object`, or `json_schema` with a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredFields(Accepting):
    """vLLM's field: one of these."""

    json_: Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None


class FormFields(Accepting):
    """The fields of a request that say which form its answer has."""

    response_format: ResponseFormat | None = None
    """The answer is a JSON object, or a JSON document of a schema."""
    structured_outputs: StructuredFields | None = None
    """The answer is JSON of a schema, matches a regular expression, is one of several texts, or is derived from a grammar."""
    guided_json: Schema | None = None
    """The former name of `structured_outputs.json`; so are the following."""
    guided_regex: Source | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None

    def form(self) -> tuple[StructuredOutputs | None, str]:
        """The form that the answer has to have, and the field that asks for it. Raises ApiError for more than one."""
        asked: dict[str, StructuredOutputs] = {}
        wanted = self.response_format
        if wanted and wanted.type != "json_schema" and wanted.json_schema:
            message = f"type={wanted.type} has no json_schema; leave it out, or set type to json_schema"
            raise ApiError(400, message, "response_format.json_schema")
        if wanted and wanted.type == "json_schema":
            if wanted.json_schema is None:
                message = "type=json_schema needs json_schema with a schema"
                raise ApiError(400, message, "response_format.json_schema")
            asked["response_format"] = StructuredOutputs(json=wanted.json_schema.schema_)
        elif wanted and wanted.type == "json_object":
            asked["response_format"] = StructuredOutputs(json_object=True)
        if fields := self.structured_outputs:
            asked["structured_outputs"] = StructuredOutputs(
                fields.json_, fields.json_object or False, fields.regex, fields.choice, fields.grammar
            )
        for name in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{name}")) is not None:
                asked[f"guided_{name}"] = StructuredOutputs(**{name: value})
        if len(asked) > 1:
            field = list(asked)[1]
            raise ApiError(400, f"{' and '.join(asked)} both give the answer a form; send one of them", field)
        return next(((form, field) for field, form in asked.items()), (None, ""))
