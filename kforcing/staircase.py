"""The staircase: one pass over N context tokens serves W windows at once.

    context        c0 c1 c2 c3 ...            causal, read once
    window w       [ y1 .. yP | h1 .. hK ]    sees c0..c_anchor(w), then itself causally; no other window

A window's block holds tokens already committed and hints, read together or a few entries at a time. Block entry l sits
at position anchor + 1 + l, so a token committed to the block stands where it belongs, and so does the paper's hint, which
stands at the position of the token it predicts. Context and blocks are two passes:
the first leaves keys and values, the second reads them through a mask of (W·L) × (N + W·L), so the context is never
recomputed for the blocks.

Shapes: B batch, N context, W windows, P committed tokens, K hints, L block entries, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Windows:
    """Windows of a batch of sequences, with the noise that turns each into a block of tokens."""

    context_BN: Tensor
    """int64 token ids."""
    anchors_BW: Tensor
    """int64, position of the last context token each window sees."""
    noise_BWK: Tensor
    """One uniform in (0, 1) for each token to make."""
    temperature_B: Tensor
    """Sampling temperature of each sequence."""
    prefix_BWP: Tensor | None = None
    """int64 tokens already committed in each window, between context and the tokens to make."""

    @property
    def k(self) -> int:
        """Tokens to make in each window."""
        return self.noise_BWK.shape[2]

    def rows(self, index_R: Tensor) -> Windows:
        """The windows of some sequences of the batch."""
        context, anchors, noise = self.context_BN[index_R], self.anchors_BW[index_R], self.noise_BWK[index_R]
        prefix = None if self.prefix_BWP is None else self.prefix_BWP[index_R]
        return Windows(context, anchors, noise, self.temperature_B[index_R], prefix)

    @property
    def temperature_BW(self) -> Tensor:
        """The temperature of each window, as a coupling wants it."""
        return self.temperature_B[:, None].expand_as(self.anchors_BW)


@dataclass(frozen=True)
class Context:
    """What a causal pass over the context leaves for the windows."""

    states_BND: Tensor
    """Final hidden states."""
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer, (B, heads, N, width of a head)."""

    def at(self, anchors_BW: Tensor) -> Tensor:
        """Final hidden states at the anchors: (B, W, D)."""
        return self.states_BND.gather(1, anchors_BW[..., None].expand(-1, -1, self.states_BND.shape[-1]))


def read_context(backbone: PreTrainedModel, context_BN: Tensor) -> Context:
    """A plain causal pass over (B, N) int64 token ids."""
    # A cache without windows: block masks number keys by position, so none may be dropped.
    out = backbone.base_model(input_ids=context_BN, past_key_values=DynamicCache(), use_cache=True)
    return Context(out.last_hidden_state, cached_layers(out))


def cached_layers(out: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer from the output of a base model."""
    return [(layer.keys, layer.values) for layer in out.past_key_values.layers]


class Reader(Protocol):
    """Reads entries of blocks that follow a context which was read before."""

    def read(self, block_BWLD: Tensor) -> Tensor:
        """The next L entries of every window, as input embeddings → their final hidden states (B, W, L, D)."""
        ...

    def fork(self, stack: nn.Module, depth: int) -> Reader:
        """A reader that goes on from here through a stack of its own, above the keys and values of the last layers."""
        ...


class BlockReader:
    """Reads entries of the windows' blocks through a stack of transformer layers, a few at a time.

    Args:
        stack: base model that takes `inputs_embeds`, `position_ids`, a 4-D boolean mask and a cache (sdpa attention).
        layers: the context's keys and values for each layer of the stack.
        anchors_BW: int64, position of the last context token each window sees.
    """

    def __init__(self, stack: nn.Module, layers: list[tuple[Tensor, Tensor]], anchors_BW: Tensor):
        self.stack, self.layers, self.anchors_BW = stack, layers, anchors_BW
        context_N = torch.arange(layers[0][0].shape[2], device=anchors_BW.device)
        self.sees_BWS = context_N <= anchors_BW[..., None]
        self.length = 0

    def fork(self, stack: nn.Module, depth: int) -> BlockReader:
        """See `Reader.fork`."""
        other = copy.copy(self)
        other.stack, other.layers = stack, self.layers[-depth:]
        return other

    def read(self, block_BWLD: Tensor) -> Tensor:
        """The next L entries of every window, as input embeddings → their final hidden states (B, W, L, D)."""
        B, W, L, D = block_BWLD.shape
        offsets_L = self.length + torch.arange(L, device=block_BWLD.device)
        positions = (self.anchors_BW[..., None] + 1 + offsets_L).view(B, W * L)
        # Keys lie as [context | earlier reads | this read], each read window by window.
        own = torch.eye(W, dtype=torch.bool, device=block_BWLD.device)
        causal = torch.ones(L, L, dtype=torch.bool, device=block_BWLD.device).tril()
        before = self.sees_BWS.repeat_interleave(L, dim=1)
        now = torch.kron(own, causal).expand(B, -1, -1)
        mask = torch.cat([before, now], dim=2)[:, None]
        out = self.stack(
            inputs_embeds=block_BWLD.reshape(B, W * L, D),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=DynamicCache(ddp_cache_data=self.layers),
            use_cache=True,
        )
        self.layers = cached_layers(out)
        self.sees_BWS = torch.cat([self.sees_BWS, own.repeat_interleave(L, dim=1).expand(B, -1, -1)], dim=2)
        self.length += L
        return out.last_hidden_state.view(B, W, L, D)


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


def ar_block_logits(backbone: PreTrainedModel, context: Context, anchors_BW: Tensor, tokens_BWK: Tensor) -> Tensor:
    """The AR model's logits for every token of given blocks, teacher-forced in one pass: (B, W, K, V) float32."""
    states_BWKD = context.at(anchors_BW)[:, :, None]
    if tokens_BWK.shape[2] > 1:
        reader = BlockReader(backbone.base_model, context.layers, anchors_BW)
        states_BWKD = torch.cat([states_BWKD, reader.read(embeddings(backbone)(tokens_BWK[..., :-1]))], dim=2)
    return lm_head(backbone, states_BWKD).float()
