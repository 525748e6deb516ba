"""Transformer layers over a slot cache.

`LeanStack` runs the layers of Llama and its relatives with their own linear maps and a few operations around them: no
masks to rebuild, no caches to concatenate, hooks and output records left out. `StockStack` runs any other base model of
transformers as it is, on the same cache. `build_stack` takes the first if it agrees with the model, number by number.

Shapes: R slots, L entries, D width, H heads, G query heads a key head, E width of a head, C columns.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers.cache_utils import Cache, CacheLayerMixin

from kforcing.cpu import pointwise
from kforcing.engine.cache import SlotCache, Span
from kforcing.engine.linear import Joined, RowLinear

LEAN = ("LlamaModel", "Qwen2Model", "Qwen3Model", "MistralModel")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


class Stack(Protocol):
    """Layers of a base model over the last layers of a cache."""

    def __call__(self, x_RLD: Tensor, span: Span) -> Tensor:
        """Entries as input embeddings → their final hidden states; their keys and values go to the cache."""
        ...


class LeanStack:
    """Llama, Qwen and Mistral layers (RMSNorm, rotary positions, grouped queries, gated MLP) as plain functions."""

    def __init__(self, model: Any, cache: SlotCache):
        self.model, self.cache = model, cache
        self.first = len(cache.layers) - len(model.layers)
        attention = model.layers[0].self_attn
        self.groups, self.scale = attention.num_key_value_groups, attention.scaling
        self.eps = model.config.rms_norm_eps
        positions = torch.arange(cache.columns, device=cache.layers[0].device)
        cos, sin = model.rotary_emb(cache.layers[0], positions[None])  # (1, C, E)
        half = sin.shape[-1] // 2
        self.cos_CE = cos[0]
        # The sign of rotate-half is in the table.
        self.sin_CE = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        lengths = (model.config.hidden_size, model.config.intermediate_size, half)
        kernels = pointwise.can_run(cache.layers[0], *lengths) and isinstance(model.layers[0].mlp.down_proj, RowLinear)
        self.normed: Any = pointwise.normed if kernels else _normed
        self.turn: Any = pointwise.turn if kernels else _turn
        self.gated: Any = pointwise.gated if kernels else _gated
        self.silu = model.config.hidden_act == "silu"
        self.layers = [
            (
                layer,
                Joined([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                Joined([layer.mlp.gate_proj, layer.mlp.up_proj]),
            )
            for layer in model.layers
        ]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the layers are of a kind that is known here."""
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        return type(model).__name__ in LEAN and rope.get("rope_type", "default") in STATIC_ROPE and not sliding

    def __call__(self, x_RLD: Tensor, span: Span) -> Tensor:
        """See `Stack`."""
        R, L, D = x_RLD.shape
        H, G, E = self.cache.heads, self.groups, self.cache.width
        # One head's worth of positions for all heads.
        cos_NE, sin_NE = (table_CE[span.positions_RL.flatten()] for table_CE in (self.cos_CE, self.sin_CE))
        mask = span.mask_R1LC
        if mask is not None and G > 1:
            mask = mask.repeat_interleave(G, dim=2)
        x = x_RLD.reshape(-1, D).contiguous()
        for i, (layer, qkv, gate_up) in enumerate(self.layers, start=self.first):
            attention, mlp = layer.self_attn, layer.mlp
            heads = qkv.whole(self._norm(x, layer.input_layernorm)).view(R * L, -1, E)  # queries, keys, values
            if hasattr(attention, "q_norm"):
                turning = heads[:, :-H]
                q, k = turning.split([H * G, H], dim=1)
                turning.copy_(
                    torch.cat(
                        [self._norm(q.contiguous(), attention.q_norm), self._norm(k.contiguous(), attention.k_norm)],
                        dim=1,
                    )
                )
            self.turn(heads, H * (G + 1), cos_NE, sin_NE)
            keys, values = self.cache.write(i, heads[:, -2 * H :], span)
            # Query heads that share a key head become more entries of that head.
            q = heads[:, : H * G].view(R, L, H, G, E).transpose(1, 2).reshape(R, H, L * G, E)
            mixed = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale)
            mixed = mixed.reshape(R, H, L, G * E).transpose(1, 2).reshape(R * L, -1)
            x = x + attention.o_proj(mixed)
            gate, up = gate_up.parts(self._norm(x, layer.post_attention_layernorm))
            x = x + mlp.down_proj(self.gated(gate, up) if self.silu else mlp.act_fn(gate) * up)
        return self._norm(x, self.model.norm).view(R, L, D)

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        return self.normed(x, norm.weight, self.eps)


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return rms_norm(x, (x.shape[-1],), gain, eps)


def _turn(heads_NAE: Tensor, H: int, cos_NE: Tensor, sin_NE: Tensor) -> None:
    """Rotary positions of the first H heads, in place: x · cos + rotate_half(x) · sin, the half's sign being in `sin`."""
    first_NHE = heads_NAE[:, :H]
    turned_NHE = first_NHE.roll(heads_NAE.shape[-1] // 2, dims=-1)
    first_NHE.mul_(cos_NE[:, None]).addcmul_(turned_NHE, sin_NE[:, None])


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


class StockStack:
    """Any base model of transformers with sdpa attention, over the same cache."""

    def __init__(self, model: Any, cache: SlotCache):
        self.model = model
        first = len(cache.layers) - model.config.num_hidden_layers
        self.layers: list[Any] = [_StockLayer(cache, first + i) for i in range(model.config.num_hidden_layers)]

    def __call__(self, x_RLD: Tensor, span: Span) -> Tensor:
        """See `Stack`."""
        for layer in self.layers:
            layer.span = span
        mask = span.mask_R1LC
        if mask is None:
            shape = (*x_RLD.shape[:1], 1, x_RLD.shape[1], span.columns)
            mask = torch.zeros(shape, dtype=x_RLD.dtype, device=x_RLD.device)
        return self.model(
            inputs_embeds=x_RLD,
            position_ids=span.positions_RL,
            attention_mask=mask,
            past_key_values=Cache(layers=self.layers),
            use_cache=True,
        ).last_hidden_state


class _StockLayer(CacheLayerMixin):
    """A layer of the slot cache as transformers wants it."""

    def __init__(self, cache: SlotCache, index: int):
        super().__init__()
        self.cache, self.index = cache, index
        self.span: Span | None = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.span is not None
        both = torch.cat([key_states, value_states], dim=1).transpose(1, 2).flatten(0, 1)
        return self.cache.write(self.index, both, self.span)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.span is not None
        return self.span.columns, 0

    def get_max_length(self) -> int:
        return self.cache.columns


@torch.inference_mode()
def build_stack(model: Any, cache: SlotCache) -> Stack:
    """The leanest stack that computes what the model computes (checked on a few entries, which the cache forgets)."""
    stock = StockStack(model, cache)
    if not LeanStack.fits(model):
        return stock
    lean = LeanStack(model, cache)
    n = min(4, cache.columns)
    device, dtype = cache.layers[0].device, cache.layers[0].dtype
    generator = torch.Generator(device="cpu").manual_seed(0)
    probe = torch.randn(1, n, model.config.hidden_size, generator=generator).to(device, dtype)
    span = cache.span(slice(0, 1), torch.arange(n, device=device)[None], n)
    mine, theirs = lean(probe, span), stock(probe, span)
    return lean if torch.allclose(mine.float(), theirs.float(), rtol=1e-2, atol=1e-2) else stock
