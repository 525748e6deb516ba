"""Windows of a batch of sequences, and the causal pass over the context that all windows of a sequence share.

A window is a place in a sequence where a block of tokens is made: the tokens up to its *anchor* are its context, and each
token of the block has one noise number. W windows of one sequence share the keys and values of one context pass.

Shapes: B batch, N context, W windows, P committed tokens, K tokens to make, D width; J heads of keys, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Windows:
    """The windows of a batch of sequences, with the noise that turns each into a block of tokens."""

    context_BN: Tensor
    """int64 token ids."""
    anchors_BW: Tensor
    """int64, the position of the last context token that each window sees."""
    noise_BWK: Tensor
    """float64, one uniform number in (0, 1) for each token to make."""
    temperature_B: Tensor
    """float32, the sampling temperature of each sequence."""
    prefix_BWP: Tensor | None = None
    """int64, tokens that each window has committed already: they follow the context and precede the tokens to make."""

    @property
    def k(self) -> int:
        """Number of tokens to make in each window."""
        return self.noise_BWK.shape[2]

    def rows(self, index_R: Tensor) -> Windows:
        """The windows of the sequences with these indices in the batch."""
        context, anchors, noise = self.context_BN[index_R], self.anchors_BW[index_R], self.noise_BWK[index_R]
        prefix = None if self.prefix_BWP is None else self.prefix_BWP[index_R]
        return Windows(context, anchors, noise, self.temperature_B[index_R], prefix)

    @property
    def temperature_BW(self) -> Tensor:
        """The temperature of each window, in the shape that couplings take: (B, W)."""
        return self.temperature_B[:, None].expand_as(self.anchors_BW)


@dataclass(frozen=True)
class Context:
    """What a causal pass over the context leaves for the windows."""

    states_BND: Tensor
    """Final hidden states."""
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer: (B, J, N, E) each."""

    def at(self, anchors_BW: Tensor) -> Tensor:
        """Final hidden states at the anchors: (B, W, D)."""
        return self.states_BND.gather(1, anchors_BW[..., None].expand(-1, -1, self.states_BND.shape[-1]))


def read_context(backbone: PreTrainedModel, context_BN: Tensor) -> Context:
    """Run the base model causally over (B, N) int64 token ids, and keep its final states, keys and values."""
    config: Any = backbone.config
    layers = [PassLayer() for _ in range(config.num_hidden_layers)]
    out = backbone.base_model(input_ids=context_BN, past_key_values=Cache(layers=[*layers]), use_cache=True)
    return Context(out.last_hidden_state, [layer.kept for layer in layers])


class PassLayer(CacheLayerMixin):
    """The keys and values that one layer makes in one pass, behind the cache interface of transformers.

    A second write replaces the first one. Activation checkpointing may therefore run a layer twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the pass."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep (B, J, S, E) keys and values, and return them."""
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: no memory is allocated ahead."""

    def get_seq_length(self) -> int:
        """Number of tokens before the pass, which is 0."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a mask covers, and the position of the first one."""
        return query_length, 0

    def get_max_length(self) -> int:
        """−1: there is no limit."""
        return -1
