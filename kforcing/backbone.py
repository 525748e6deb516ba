"""Access to the parts of a Hugging Face causal LM, and how one is built or loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)


def text_config(config: PretrainedConfig) -> Any:
    """The part of a config that describes the decoder of text; the config itself where there is no other part."""
    return config.get_text_config(decoder=True)


def embeddings(backbone: PreTrainedModel) -> nn.Embedding:
    """The token embedding of a backbone."""
    return cast(nn.Embedding, backbone.get_input_embeddings())


class FinishedHead(nn.Module):
    """An LM head and what its model does with logits behind it: c · tanh(s · logits / c), for a scale s and a cap c.

    It shares the parameters of the head. Without a cap, logits are scaled alone.
    """

    def __init__(self, linear: nn.Linear, scale: float, cap: float | None):
        super().__init__()
        self.linear, self.scale, self.cap = linear, scale, cap

    @property
    def weight(self) -> Tensor:
        """The (V, D) matrix."""
        return self.linear.weight

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) → (..., V)."""
        logits = self.linear(states) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


_LOGIT_SCALES: WeakKeyDictionary[PreTrainedModel, tuple[float, float | None]] = WeakKeyDictionary()
"""The scale and the cap of each model's logits. Every step of an engine asks for them several times."""


def head(backbone: PreTrainedModel) -> nn.Linear | FinishedHead:
    """The LM head of a backbone, which maps final states to logits; context and hints share it."""
    linear = cast(nn.Linear, backbone.get_output_embeddings())
    if backbone not in _LOGIT_SCALES:
        _LOGIT_SCALES[backbone] = _scale_and_cap(text_config(backbone.config))
    scale, cap = _LOGIT_SCALES[backbone]
    return linear if scale == 1 and cap is None else FinishedHead(linear, scale, cap)


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What a model scales its logits by, and the cap of its soft-capping."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    if divisor := getattr(config, "logits_scaling", None):  # Granite divides, HyperCLOVA multiplies
        scale *= divisor if config.model_type == "hyperclovax" else 1 / divisor
    return scale, getattr(config, "final_logit_softcapping", None)


def check_head_rows(backbone: PreTrainedModel, setting: str, without_bias: bool = True) -> None:
    """Raise ValueError unless rows of the LM head's matrix give logits, which a setting needs.

    Args:
        setting: the setting and its value, for the error.
        without_bias: whether a bias of the head is in the way.
    """
    lm_head = head(backbone)
    if isinstance(lm_head, FinishedHead):
        found = "scales or soft-caps its logits"
    elif without_bias and lm_head.bias is not None:
        found = "has an LM head with a bias"
    else:
        return
    raise ValueError(f"{setting} takes logits from rows of the LM head, and {type(backbone).__name__} {found}; use 0")


def key_heads(backbone: PreTrainedModel) -> tuple[int, int]:
    """Heads of keys of a backbone, and their width."""
    config: Any = backbone.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def lm_head(backbone: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits of hidden states: (..., D) → (..., V)."""
    # torch multiplies states with gaps in memory row by row, which takes 16 times as long.
    return head(backbone)(states.contiguous())


def head_rows(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    """The vectors that the LM head multiplies a state with for these tokens: (...) ids → (..., D)."""
    lm: Any = backbone.get_output_embeddings()
    return lm.rows(ids) if hasattr(lm, "rows") else lm.weight[ids]


def build_backbone(config: dict[str, Any]) -> PreTrainedModel:
    """A randomly initialised causal LM from its config dictionary, in the config's dtype, with sdpa attention."""
    hf_config = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa")


INSIDE = {r"^(model\.)?(language|text)_model\.(?!lm_head)(model\.)?": "model.", r"^language_model\.lm_head": "lm_head"}
"""Names of weights in models of text and images → their names in the model of text alone."""


def load_ar(folder: str, gguf_file: str | None = None, dtype: Any = torch.float32) -> Any:
    """A causal LM with sdpa attention. Of a model of text and images, the model of text; of fp8 weights, what they stand for.

    Args:
        folder: a folder or a hub id.
        gguf_file: the file in it that holds the weights, when they are GGUF.
        dtype: of the weights; `auto` for the one they were saved in.
    Raises:
        ValueError: when the weights are quantised in a way that cannot be undone here, or some of them are missing.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "gguf_file": gguf_file}
    if gguf_file is None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if problem := quantised(config):
            raise ValueError(f"{folder}: {problem}")
        if getattr(config, "quantization_config", None):
            options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
        if text_config(config) is not config:
            inner = text_config(config)
            inner.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
            options |= {"config": inner, "key_mapping": INSIDE}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, **options
    )
    model, info = loaded
    if missing := sorted(str(name) for name in (*info["missing_keys"], *info["mismatched_keys"])):
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}, which would be random numbers: "
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"
        )
    _as_if_made_here(model)
    return model.eval()


def quantised(config: PretrainedConfig) -> str | None:
    """Why quantised weights cannot be read; None when they are not quantised, or are fp8, which can be undone."""
    record: Any = getattr(config, "quantization_config", None)
    if not record:
        return None
    method = record.get("quant_method") if isinstance(record, dict) else record.quant_method
    method = getattr(method, "value", method)
    if method == "fp8" and find_spec("accelerate"):
        return None
    needs = "needs `pip install accelerate`" if method == "fp8" else "cannot be undone here"
    return f"its weights are quantised ({method}), which {needs}; give the model as it was before quantisation"


def _as_if_made_here(model: Any) -> None:
    """Let a model forget the format that its weights were loaded from, in which transformers would save them again."""
    model.hf_quantizer = model._weight_conversions = None
    for name in ("is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)


def random_llama(**sizes: int) -> Any:
    """An untrained Llama for benchmarks, by default with 110 M parameters (12 × 768, vocabulary 32,000).

    Args:
        sizes: settings of `LlamaConfig` that replace those of the default model.
    """
    default: dict[str, Any] = {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "intermediate_size": 2048,
        "max_position_embeddings": 4096,
    }
    config = LlamaConfig(**(default | sizes), tie_word_embeddings=True)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
