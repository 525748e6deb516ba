"""Which architectures of transformers can be a backbone, found by trying a tiny random copy of their config.

`find_obstacle` says in one line what stands in the way of a model, before any of its weights are read. As a command, it
tries the default configs of families of transformers and prints a table:

    python -m kforcing.families [FAMILY …]
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from kforcing.attention.reader import ar_block_states
from kforcing.attention.windows import read_context
from kforcing.backbone import lm_head, text_config
from kforcing.design import Design
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.modeling import PushForwardLM

GOOD = "Llama, Qwen2, Qwen3, Mistral, Mixtral, Gemma, Phi-3, OLMo 2, Granite, Cohere, GPT-2 and GPT-NeoX"
"""Some families that work, for error texts. README.md has the whole table."""
LAYERS, HEADS, VOCABULARY = 2, 4, 64
"""The largest sizes of a tiny copy."""
LIMITS = {
    "intermediate": 64,
    "ffn": 64,
    "inner": 64,
    "per_tok": 2,
    "top_k": 2,
    "topk_group": 1,
    "experts": 4,
    "group": 1,
    "first_k_dense": 1,
    "kv_shared": 1,
    "vocab_size": VOCABULARY,
}
"""The largest value of settings whose name contains these words, in a tiny copy."""
CONTEXT, BLOCK = 9, 3
"""Tokens of the context and of the block that a tiny copy reads."""

STATES = "some layers keep a state instead of keys and values"
OWN_ATTENTION = "its attention is not one that transformers can compute by sdpa through its AttentionInterface"
CAUSES = {
    "conv_state": STATES,
    "recurrent_state": STATES,
    "'num_attention_heads'": STATES,
    "is a per-layer attribute": "its layers have heads of different widths",
    "indexer": "its attention is sparse (an indexer chooses the keys)",
    "cache of its own": STATES,
    "same head size": "its keys and values have different widths (multi-head latent attention)",
    "Unrecognized configuration class": "transformers has no causal LM of text alone for it",
    "does not call its attention through": OWN_ATTENTION,
    "scaled_dot_product_attention": OWN_ATTENTION,
}
"""Words of an error → the feature that it comes from."""


class Obstacle(ValueError):
    """What stands in the way of an architecture."""


class Untried(RuntimeError):
    """Why no tiny copy of an architecture could be made."""


def find_obstacle(config: PretrainedConfig, design: Design | None = None, k: int = BLOCK) -> str | None:
    """What keeps a model with this config from being a backbone, in one line; None when nothing does.

    A tiny random copy must be causal, have the logits of its LM head, read a block after a context as it reads both in one
    pass, and decode in the engine what it decodes without. With a design, a student of k tokens must be made from it, too.
    An architecture of which no tiny copy can be made passes: it is not known what is in its way.
    """
    try:
        _try(config, design, k)
    except Obstacle as error:
        return str(error)
    except Untried:
        return None
    return None


def _check_config(config: PretrainedConfig) -> None:
    """Raise Obstacle for what a config alone tells."""
    if config.is_encoder_decoder:
        raise Obstacle("it is an encoder and a decoder")
    if cap := getattr(config, "attn_logit_softcapping", None):
        raise Obstacle(f"its attention scores are soft-capped (attn_logit_softcapping={cap})")
    if shared := getattr(config, "num_kv_shared_layers", None):
        raise Obstacle(f"layers share the keys and values of other layers (num_kv_shared_layers={shared})")
    kinds = set(getattr(config, "layer_types", None) or ())
    if states := sorted(kind for kind in kinds if "attention" not in kind or "linear" in kind):
        raise Obstacle(f"{STATES} ({', '.join(states)})")


def tiny_copy(config: Any) -> PretrainedConfig:
    """The same architecture with few layers, heads, experts and tokens; heads keep their width, and layers their kinds."""
    total, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    kinds = getattr(config, "layer_types", None) or []
    layers = sorted({kinds.index(kind) for kind in kinds} or {0})
    layers = sorted({*layers, *range(LAYERS)})[: max(LAYERS, len(layers))]
    few = min(heads, HEADS)
    new_width = few * (getattr(config, "head_dim", None) or width // heads)
    sizes = {
        "num_hidden_layers": len(layers),
        "num_attention_heads": few,
        "num_key_value_heads": max(1, few // groups),
        "hidden_size": new_width,
    }
    record = {name: _smaller(name, value, total, layers) for name, value in config.to_dict().items()}
    record |= {name: new_width for name, value in config.to_dict().items() if type(value) is int and value == width}
    names = {config.attribute_map.get(name, name): value for name, value in sizes.items()}
    record |= {name: value for name, value in names.items() if name in record}
    for name in ("bos_token_id", "eos_token_id", "dtype", "quantization_config", "architectures", "auto_map"):
        record.pop(name, None)
    if isinstance(record.get("pad_token_id"), int):
        record["pad_token_id"] = 0
    return type(config).from_dict(record)


def _smaller(name: str, value: Any, total: int, layers: list[int]) -> Any:
    """A setting of a config in a tiny copy of so many layers; lists with an entry for each layer are cut to these."""
    if isinstance(value, list) and len(value) == total:
        return [value[i] for i in layers]
    limit = next((limit for part, limit in LIMITS.items() if part in name), None)
    return min(value, limit) if type(value) is int and limit is not None else value


def _known_cause(error: Exception) -> str | None:
    return next((cause for words, cause in CAUSES.items() if words in str(error)), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _random_model(config: PretrainedConfig) -> Any:
    """A tiny model whose matrices are far from zero, so that whatever they do shows in its logits."""
    torch.manual_seed(0)
    try:
        tiny = tiny_copy(config)
        model = AutoModelForCausalLM.from_config(tiny, attn_implementation="sdpa", dtype=torch.float32).eval()
    except Exception as error:
        if cause := _known_cause(error):
            raise Obstacle(cause + (_biases(tiny) if cause == OWN_ATTENTION else "")) from None
        raise Untried(_first_line(error)) from None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def _biases(tiny: PretrainedConfig) -> str:
    """What an attention that sdpa cannot compute adds to its scores, where that can be told."""
    model: Any = AutoModelForCausalLM.from_config(tiny, attn_implementation="eager")
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    alibi = any("alibi" in name for name in dir(model.base_model))
    return " (attention sinks)" * sinks + " (ALiBi position biases)" * alibi


def _try(config: PretrainedConfig, design: Design | None, k: int) -> None:
    """Raise Obstacle unless a tiny copy can do all that a backbone has to do, and Untried when there is none."""
    config, loudness = text_config(config), logging.get_verbosity()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        try:
            _check_config(config)
            model = _random_model(config)
            ids = torch.randint(1, model.config.vocab_size, (1, CONTEXT + BLOCK))
            _check_passes(model, ids)
            _check_engine(model, ids[0].tolist())
            if design is not None:
                _check_student(model, ids, design, k)
        except (Obstacle, Untried):
            raise
        except Exception as error:
            raise Obstacle(_known_cause(error) or _first_line(error)) from error
        finally:
            logging.set_verbosity(loudness)


def _check_passes(model: Any, ids: Tensor) -> None:
    whole = model(input_ids=ids, use_cache=False).logits
    other = ids.clone()
    other[:, -1] = 1 + other[:, -1] % (model.config.vocab_size - 1)
    if not _same(model(input_ids=other, use_cache=False).logits[:, :-1], whole[:, :-1]):
        raise Obstacle("its tokens see later tokens: it is an encoder")
    if model.base_model is model:
        raise Obstacle("it has no base model apart from its LM head")
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not _same(lm_head(model, states), whole):
        raise Obstacle("its logits are not those of its LM head, nor scaled or soft-capped in a way that is known here")
    anchors = torch.tensor([[CONTEXT - 1]])
    block = ar_block_states(model, read_context(model, ids[:, :CONTEXT]), anchors, ids[:, None, CONTEXT:])
    if not _same(block[:, 0], states[:, CONTEXT - 1 : -1]):
        raise Obstacle("a block that is read after its context has other states than in one pass over both")


def _check_engine(model: Any, ids: list[int]) -> None:
    prompt = ids[:CONTEXT]
    engine = Engine(model, EngineConfig(max_num_seqs=1, max_model_len=CONTEXT + BLOCK, row_kernel=False))
    (done,) = engine.generate([Request(prompt, BLOCK, sampling=SamplingParams(temperature=0.0))])
    logits = model(input_ids=torch.tensor([prompt + done.tokens]), use_cache=False).logits[0]
    if logits[CONTEXT - 1 : -1].argmax(dim=-1).tolist() != done.tokens:
        raise Obstacle("the engine continues a prompt otherwise than the model itself")


def _check_student(model: Any, ids: Tensor, design: Design, k: int) -> None:
    parts = design.sequential
    layers = min(parts.hint_layers, model.config.num_hidden_layers)
    design = dataclasses.replace(design, sequential=dataclasses.replace(parts, hint_layers=layers))
    student = PushForwardLM.from_backbone(model, k, design).eval()
    student(ids, torch.full((1, k), 0.5, dtype=torch.float64), design.noise.temperature_min)


def _same(mine: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


FAMILIES = """
llama mistral ministral3 mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3 gemma3n gemma4 phi phi3 phimoe olmo
olmo2 olmo3 olmoe smollm3 seed_oss exaone4 glm4 glm4_moe ernie4_5 hunyuan_v1_dense granite granitemoe granitemoehybrid
hyperclovax cohere cohere2 starcoder2 helium apertus arcee bitnet nanochat vaultgemma gpt2 gpt_bigcode gpt_neox opt persimmon
biogpt gpt_neo gptj codegen bloom mpt falcon stablelm nemotron llama4 deepseek_v3 gpt_oss qwen3_next qwen3_5 lfm3 jamba mamba
mamba2 falcon_h1 nemotron_h recurrent_gemma rwkv bert roberta t5 bart
"""
"""The families of the table."""
SETTINGS: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoe": {"logits_scaling": 6.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hyperclovax": {"logits_scaling": 0.125},
}
"""Settings in which real models of a family differ from the defaults of transformers."""


def main() -> None:
    """Print a table of families: those that work, and what stands in the way of the others."""
    verdicts: dict[str, list[str]] = {"works": []}
    for family in sys.argv[1:] or FAMILIES.split():
        verdict = "works"
        try:
            _try(AutoConfig.for_model(family, **SETTINGS.get(family, {})), Design("sequential", "gumbel"), BLOCK)
        except (Obstacle, Untried) as error:
            verdict = str(error)
        verdicts.setdefault(verdict, []).append(f"`{family}`")
    print("| families | |\n|---|---|")
    for verdict, families in verdicts.items():
        print(f"| {', '.join(families)} | {verdict} |")


if __name__ == "__main__":
    main()
