"""Reading the blocks of all windows of a sequence after one pass over their shared context.

    context        c0 c1 c2 c3 ...            causal, read once
    window w       [ y1 .. yP | h1 .. hK ]    sees c0..c_anchor(w), then itself causally; no other window

The block of a window holds committed tokens and hints. A reader takes all entries of the blocks together, or a few at a
time. Entry l of a block has position anchor + 1 + l: a committed token has the position that it would have in the
sequence, and the paper's hint has the position of the token that it predicts.

The context pass (`kforcing.attention.windows`) keeps its keys and values. A read attends to them through a function
that transformers calls like any other attention (`attend`), so nothing of the context is computed, copied or masked again.

Shapes: B batch, N context, W windows, K tokens of a block, L block entries of one read, T block entries so far, D width,
V vocabulary; J heads of keys, E width of a head, S = W · L.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kforcing.attention.staircase import Staircase, has_causal_kernel, staircase_attention
from kforcing.attention.windows import Context, PassLayer, read_context
from kforcing.backbone import embeddings, head, lm_head


class WindowLayer(PassLayer):
    """Keys and values of all block entries in one layer: those of earlier reads, followed by those of the current read.

    Args:
        context: keys and values of the context, (B, J, N, E) each.
        before: keys and values of earlier reads, (B, J, W, T, E) each; None for the first read.
        windows: W.
    """

    def __init__(self, context: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor] | None, windows: int):
        super().__init__()
        self.context, self.before, self.windows = context, before, windows
        self.attended = False
        self.done = False
        """Whether the read is over. A layer that runs again after that, for its gradients, lets its keys and values go."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, J, W·L, E) keys and values to those of earlier reads, as (B, J, W, T, E); return them as given."""
        now = [x.unflatten(2, (self.windows, -1)) for x in (key_states, value_states)]
        if self.before is not None:
            now = [torch.cat([old, new], dim=3) for old, new in zip(self.before, now, strict=True)]
        self.keys, self.values = now
        return key_states, value_states

    def forget(self) -> None:
        """Drop the keys and values. Activation checkpointing keeps this object until it runs the layer again."""
        self.keys = self.values = None
        self.done = True


@dataclass(frozen=True)
class Passage:
    """The arguments of a read that the attention function of every layer needs."""

    staircase: Staircase
    layers: list[WindowLayer]


ATTENTION = "staircase"
# Settings of an attention that the kernels here do not support. Other arguments that a model passes have no effect on blocks.
UNKNOWN = ("softcap", "s_aux", "position_bias")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    staircase: Passage | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function `staircase` of transformers: reads of blocks come with a `Passage`, other passes use sdpa.

    Returns:
        (B, S, H, E) output, and None in place of attention weights.
    Raises:
        ValueError: a read comes with dropout, soft-capping, attention sinks or position biases.
    """
    if staircase is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None] + ["dropout"] * (dropout > 0)
    if unknown:
        raise ValueError(
            f"the attention of {type(module).__name__} has {', '.join(unknown)}, which reads of blocks do not support; "
            "call eval() to switch dropout off, or choose a backbone like Llama, Qwen or GPT-2"
        )
    layer = staircase.layers[cast(int, module.layer_idx)]
    layer.attended = True
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = staircase_attention(query, *layer.context, *layer.kept, staircase.staircase, scale)
    if layer.done:
        layer.forget()
    return out, None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class Reader(Protocol):
    """Reads the entries of blocks after a context that has been read before."""

    def read(self, block_BWLD: Tensor) -> Tensor:
        """Read the next L entries of every window: (B, W, L, D) input embeddings → (B, W, L, D) final hidden states."""
        ...

    def fork(self, stack: nn.Module, depth: int) -> Reader:
        """A reader that continues from here through another stack of `depth` layers.

        The layers of that stack see the keys and values of the last `depth` layers of this reader.
        """
        ...


class BlockReader:
    """Reads the entries of the windows' blocks through a stack of transformer layers, a few entries at a time.

    Args:
        stack: base model that takes `inputs_embeds`, `position_ids` and a cache, and calls its attention through the
            `AttentionInterface` of transformers. The first read sets its attention to `staircase`, which computes all other
            passes as sdpa does.
        layers: keys and values of the context for each layer of the stack, (B, J, N, E) each.
        anchors_BW: int64, the position of the last context token that each window sees.
    """

    def __init__(self, stack: nn.Module, layers: list[tuple[Tensor, Tensor]], anchors_BW: Tensor):
        keys = layers[0][0]
        self.stack, self.contexts, self.anchors_BW = stack, layers, anchors_BW
        self.staircase = Staircase(anchors_BW, keys.shape[2], has_causal_kernel(keys))
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        self.length = 0

    def fork(self, stack: nn.Module, depth: int) -> BlockReader:
        """Implements `Reader.fork`."""
        other = copy.copy(self)
        other.stack, other.contexts, other.own = stack, self.contexts[-depth:], self.own[-depth:]
        return other

    def read(self, block_BWLD: Tensor) -> Tensor:
        """Read the next L entries of every window: (B, W, L, D) input embeddings → (B, W, L, D) final hidden states.

        Raises ValueError when the stack does not call its attention through the `AttentionInterface` of transformers.
        """
        B, W, L, D = block_BWLD.shape
        offsets_L = self.length + torch.arange(L, device=block_BWLD.device)
        layers = [WindowLayer(context, own, W) for context, own in zip(self.contexts, self.own, strict=True)]
        stack = cast(PreTrainedModel, self.stack)
        if stack.config._attn_implementation != ATTENTION:
            stack.set_attn_implementation(ATTENTION)
        out = stack(
            inputs_embeds=block_BWLD.reshape(B, W * L, D),
            position_ids=(self.anchors_BW[..., None] + 1 + offsets_L).view(B, W * L),
            # transformers builds no mask of its own when it is given one of four dimensions; `attend` ignores it.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=block_BWLD.device),
            past_key_values=Cache(layers=[*layers]),
            use_cache=True,
            staircase=Passage(self.staircase, layers),
        )
        if not all(layer.attended for layer in layers):
            raise ValueError(
                f"{type(stack).__name__} does not call its attention through transformers' AttentionInterface, so its "
                "blocks cannot be read; choose a backbone like Llama, Qwen, Mistral, GPT-2 or GPT-NeoX"
            )
        self.own = [layer.kept for layer in layers]
        for layer in layers:
            layer.forget()
        self.length += L
        return out.last_hidden_state.view(B, W, L, D)


def ar_block_states(backbone: PreTrainedModel, context: Context, anchors_BW: Tensor, tokens_BWK: Tensor) -> Tensor:
    """The AR model's final states that predict each token of given blocks, teacher-forced in one pass: (B, W, K, D).

    State 0 is the context's at the anchor; state j follows tokens 0 … j − 1 of the block.
    """
    states_BWKD = context.at(anchors_BW)[:, :, None]
    if tokens_BWK.shape[2] == 1:
        return states_BWKD
    reader = BlockReader(backbone.base_model, context.layers, anchors_BW)
    return torch.cat([states_BWKD, reader.read(embeddings(backbone)(tokens_BWK[..., :-1]))], dim=2)


def ar_block_logits(backbone: PreTrainedModel, context: Context, anchors_BW: Tensor, tokens_BWK: Tensor) -> Tensor:
    """The AR model's logits for each token of given blocks, teacher-forced in one pass: (B, W, K, V) float32."""
    return lm_head(backbone, ar_block_states(backbone, context, anchors_BW, tokens_BWK)).float()


def check_backbone(backbone: PreTrainedModel) -> None:
    """Check that blocks can be read, and that logits are the LM head applied to the final states of the base model.

    Raises ValueError when one of the two does not hold.
    """
    vocabulary = head(backbone).weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, 8, device=next(backbone.parameters()).device).long()[None]
    with torch.no_grad():
        whole = backbone(input_ids=ids, use_cache=False).logits
        parts = lm_head(backbone, backbone.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(backbone).__name__} changes its logits after the LM head in a way that is not known here; the hints "
            "share the head and would not see it. Choose a backbone without such a step, like Llama, Qwen or GPT-2"
        )
    with torch.no_grad():
        reader = BlockReader(backbone.base_model, read_context(backbone, ids).layers, ids[:, :1])
        reader.read(embeddings(backbone)(ids[:, None, :1]))
