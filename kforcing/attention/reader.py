"""The staircase: one pass over N context tokens serves W windows at once.

    context        c0 c1 c2 c3 ...            causal, read once
    window w       [ y1 .. yP | h1 .. hK ]    sees c0..c_anchor(w), then itself causally; no other window

A window's block holds tokens already committed and hints, read together or a few entries at a time. Block entry l sits
at position anchor + 1 + l, so a token committed to the block stands where it belongs, and so does the paper's hint, which
stands at the position of the token it predicts. Context and blocks are two passes: the first leaves keys and values, the
second reads them where they lie, through an attention function of its own (`kforcing.attention`) which transformers calls
like any other. Nothing of the context is computed, copied or masked again for the blocks.

Shapes: B batch, N context, W windows, P committed tokens, K hints, L block entries, D width, V vocabulary; J heads of keys,
E their width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kforcing.attention.staircase import Staircase, has_causal_kernel, staircase_attention
from kforcing.backbone import embeddings, head, lm_head


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
    """SamplingParams temperature of each sequence."""
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
    config: Any = backbone.config
    layers = [PassLayer() for _ in range(config.num_hidden_layers)]
    out = backbone.base_model(input_ids=context_BN, past_key_values=Cache(layers=[*layers]), use_cache=True)
    return Context(out.last_hidden_state, [layer.kept for layer in layers])


class PassLayer(CacheLayerMixin):
    """Keys and values of one layer in one pass, as transformers wants them.

    What is written replaces what was there, so a layer that is computed a second time for its gradients changes nothing.
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
        """Keep (B, J, S, E) keys and values."""
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def get_seq_length(self) -> int:
        """Tokens before the pass: none."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys to make a mask for, and the position of the first."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class WindowLayer(PassLayer):
    """Keys and values of the windows' entries in one layer: those of earlier reads, and those of the read in progress."""

    def __init__(self, context: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor] | None, windows: int):
        super().__init__()
        self.context, self.before, self.windows = context, before, windows
        self.attended = False
        self.done = False
        """Whether the read is over: a layer that is computed again writes its keys and values for itself alone."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep (B, J, W·L, E) keys and values behind those of earlier reads, as (B, J, W, T, E)."""
        now = [x.unflatten(2, (self.windows, -1)) for x in (key_states, value_states)]
        if self.before is not None:
            now = [torch.cat([old, new], dim=3) for old, new in zip(self.before, now, strict=True)]
        self.keys, self.values = now
        return key_states, value_states

    def forget(self) -> None:
        """Let keys and values go: whoever computes the layer again holds on to this object until then."""
        self.keys = self.values = None
        self.done = True


@dataclass(frozen=True)
class Passage:
    """What travels with a read down to the attention function of every layer."""

    staircase: Staircase
    layers: list[WindowLayer]


ATTENTION = "staircase"
# Settings of an attention that the kernels here do not know; anything else a model passes has no effect on blocks.
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
    """transformers' attention function `staircase`: for reads of blocks; any other pass is sdpa's.

    Raises ValueError for dropout, soft-capping, sinks or position biases in blocks.
    """
    if staircase is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None] + ["dropout"] * (dropout > 0)
    if unknown:
        raise ValueError(
            f"the attention of {type(module).__name__} has {', '.join(unknown)}, which blocks cannot be read with; "
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
        stack: base model that takes `inputs_embeds`, `position_ids` and a cache and calls its attention through
            transformers' `AttentionInterface`; it is set to the one registered here, which leaves other passes as they are.
        layers: the context's keys and values for each layer of the stack.
        anchors_BW: int64, position of the last context token each window sees.
    """

    def __init__(self, stack: nn.Module, layers: list[tuple[Tensor, Tensor]], anchors_BW: Tensor):
        keys = layers[0][0]
        self.stack, self.contexts, self.anchors_BW = stack, layers, anchors_BW
        self.staircase = Staircase(anchors_BW, keys.shape[2], has_causal_kernel(keys))
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        self.length = 0

    def fork(self, stack: nn.Module, depth: int) -> BlockReader:
        """See `Reader.fork`."""
        other = copy.copy(self)
        other.stack, other.contexts, other.own = stack, self.contexts[-depth:], self.own[-depth:]
        return other

    def read(self, block_BWLD: Tensor) -> Tensor:
        """The next L entries of every window, as input embeddings → their final hidden states (B, W, L, D).

        Raises ValueError for a stack that does not call its attention through transformers' `AttentionInterface`.
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
            attention_mask=torch.ones(
                1, 1, 1, 1, dtype=torch.bool, device=block_BWLD.device
            ),  # a made one is left alone
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
    """The AR model's states from which every token of given blocks is read, teacher-forced in one pass: (B, W, K, D)."""
    states_BWKD = context.at(anchors_BW)[:, :, None]
    if tokens_BWK.shape[2] == 1:
        return states_BWKD
    reader = BlockReader(backbone.base_model, context.layers, anchors_BW)
    return torch.cat([states_BWKD, reader.read(embeddings(backbone)(tokens_BWK[..., :-1]))], dim=2)


def ar_block_logits(backbone: PreTrainedModel, context: Context, anchors_BW: Tensor, tokens_BWK: Tensor) -> Tensor:
    """The AR model's logits for every token of given blocks, teacher-forced in one pass: (B, W, K, V) float32."""
    return lm_head(backbone, ar_block_states(backbone, context, anchors_BW, tokens_BWK)).float()


def check_backbone(backbone: PreTrainedModel) -> None:
    """Raise ValueError unless blocks can be read, and logits are the LM head applied to the base model's states.

    Soft-capped or scaled logits would silently be lost by the shared head of the hints.
    """
    vocabulary = head(backbone).weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, 8, device=next(backbone.parameters()).device).long()[None]
    with torch.no_grad():
        whole = backbone(input_ids=ids, use_cache=False).logits
        parts = lm_head(backbone, backbone.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(backbone).__name__} changes its logits after the LM head (scaling or soft-capping); the hints "
            "share the head and would not see it. Choose a backbone without such a step, like Llama, Qwen or GPT-2."
        )
    with torch.no_grad():
        reader = BlockReader(backbone.base_model, read_context(backbone, ids).layers, ids[:, :1])
        reader.read(embeddings(backbone)(ids[:, None, :1]))
