"""Access to the parts of a Hugging Face causal LM, and how one is built or loaded."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)


def embeddings(backbone: PreTrainedModel) -> nn.Embedding:
    """The token embedding of a backbone."""
    return cast(nn.Embedding, backbone.get_input_embeddings())


def head(backbone: PreTrainedModel) -> nn.Linear:
    """The LM head of a backbone, shared by context and hints."""
    return cast(nn.Linear, backbone.get_output_embeddings())


def key_heads(backbone: PreTrainedModel) -> tuple[int, int]:
    """Heads of keys of a backbone, and their width."""
    config: Any = backbone.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def lm_head(backbone: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits of hidden states: (..., D) → (..., V)."""
    return head(backbone)(states)


def head_rows(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    """The vectors that the LM head multiplies a state with for these tokens: (...) ids → (..., D)."""
    lm: Any = head(backbone)
    return lm.rows(ids) if hasattr(lm, "rows") else lm.weight[ids]


def build_backbone(config: dict[str, Any]) -> PreTrainedModel:
    """A randomly initialised causal LM from its config dictionary, in the config's dtype, with sdpa attention."""
    hf_config = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa")


def load_ar(folder: str, gguf_file: str | None = None) -> Any:
    """A causal LM in float32 with sdpa attention.

    Args:
        folder: a folder or a hub id.
        gguf_file: the file in it that holds the weights, when they are GGUF.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", gguf_file=gguf_file
    )
    return model.eval()


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
