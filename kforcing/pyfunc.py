"""The loader of registered students for `mlflow.pyfunc`: MLflow imports this module and calls `_load_pyfunc`."""

from __future__ import annotations

from typing import Any

from kforcing.detokenizer import Detokenizer
from kforcing.engine import Engine, Request, SamplingParams
from kforcing.loading import eos_token_ids, load_model, load_tokenizer, saved_generation_config
from kforcing.prompts import prompt_ids


class TextGenerator:
    """A student's folder with the `predict` that `mlflow.pyfunc` calls."""

    def __init__(self, folder: str):
        self.detokenizer = Detokenizer(load_tokenizer(folder))
        self.engine = Engine(load_model(folder))
        self.stop_ids = eos_token_ids(
            saved_generation_config(folder), self.detokenizer.tokenizer, self.engine.vocabulary
        )

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """The continuation of each prompt, without the prompt. All prompts use the same seed.

        Args:
            model_input: a list of strings, or a DataFrame with the column `prompt`.
            params: `max_new_tokens` (default 64), `temperature` (default 1), `seed` (default 0), and `k`, the tokens per
                forward pass (default 0: the student's k).
        Raises:
            ValueError: for another column, or a value that the student does not support.
        """
        given = params or {}
        sampling = SamplingParams(temperature=given.get("temperature", 1.0))
        limit, seed, k = given.get("max_new_tokens", 64), given.get("seed", 0), given.get("k") or None
        prompts = [prompt_ids(self.detokenizer.tokenizer, prompt) for prompt in _prompts(model_input)]
        done = self.engine.generate([Request(ids, limit, seed, self.stop_ids, k, sampling) for ids in prompts])
        return [self.detokenizer.continuation(ids, c.tokens) for ids, c in zip(prompts, done, strict=True)]


def _prompts(model_input: Any) -> list[str]:
    """The strings of a list, or of the only column of a DataFrame (MLflow turns a list into one with the column 0)."""
    if not hasattr(model_input, "columns"):
        return list(model_input)
    name = model_input.columns[0]
    if name not in ("prompt", 0):
        raise ValueError(
            f"the input has the column {name!r}; give a list of strings or a DataFrame with the column prompt"
        )
    return list(model_input[name])


def _load_pyfunc(data_path: str) -> TextGenerator:
    return TextGenerator(data_path)
