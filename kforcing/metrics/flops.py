"""What a pass costs: operations and bytes of weights, counted on the real code and predicted from its shapes.

Decoding at a small batch waits for weights to come from memory, at a large one for arithmetic. Both are here: FLOPs (a
multiply-add is two) of matrix products and attention, and the bytes of weights that one step reads, each weight as often
as it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from kforcing.attention.windows import Windows, read_context
from kforcing.backbone import embeddings, head, key_heads
from kforcing.modeling import PushForwardLM
from kforcing.readout.argmax import ArgmaxReadout
from kforcing.readout.sequential import SequentialReadout


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def flop_counter() -> FlopCounterMode:
    """A context manager whose `get_total_flops()` counts matrix products and attention, that of the CPU included."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


class WeightReads(TorchDispatchMode):
    """EngineStats the bytes of a module's weights that operations read; a gather counts the rows it takes."""

    GATHERS = (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor)

    def __init__(self, module: nn.Module):
        super().__init__()
        self.storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and add what it reads of the weights."""
        out = func(*args, **(kwargs or {}))
        if func.is_view or "detach" in str(func):
            return out
        for x in args:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.storages:
                read = out if func in self.GATHERS else x
                self.bytes += read.numel() * x.element_size()
        return out


@dataclass(frozen=True)
class StepCost:
    """One cached decoding step of one sequence: k committed tokens in, k tokens out."""

    flops: float
    bytes: float


@torch.no_grad()
def measured_step(student: PushForwardLM, k: int, context: int) -> StepCost:
    """Count a real step after `context` tokens of cache."""
    device = next(student.parameters()).device
    vocabulary = head(student.backbone).weight.shape[0]
    ids = torch.arange(context + k, device=device)[None] % vocabulary
    past = read_context(student.backbone, ids[:, :context])
    windows = Windows(
        ids[:, :context],
        torch.full((1, 1), context - 1, device=device),
        torch.full((1, 1, k), 0.5, dtype=torch.float64, device=device),
        torch.ones(1, device=device),
        ids[:, None, context:],
    )
    with flop_counter() as flops:
        student.draw(windows, past)
    with WeightReads(student) as reads:
        student.draw(windows, past)
    return StepCost(flops.get_total_flops(), reads.bytes)


def predicted_ar_step(backbone: PreTrainedModel) -> StepCost:
    """One step of plain AR decoding: every matrix read once for one position."""
    matrices = _matrices(backbone.base_model) - embeddings(backbone).weight.numel() + head(backbone).weight.numel()
    return StepCost(2 * matrices, next(backbone.parameters()).element_size() * matrices)


def attention_step(backbone: PreTrainedModel, entries: int, context: int) -> StepCost:
    """What attention adds for each sequence of a batch: its keys and values read once, `entries` queries over them."""
    config: Any = backbone.config
    heads, width = key_heads(backbone)
    size = next(backbone.parameters()).element_size()
    columns = config.num_hidden_layers * context * width
    return StepCost(4 * entries * columns * config.num_attention_heads, 2 * size * columns * heads)


def predicted_step(student: PushForwardLM, k: int) -> StepCost:
    """The same from parameter counts: matrices × positions, attention over the context left out.

    Paper's read-out: trunk, noise encoder and head are read once, for 2k, k and k positions. Sequential: the trunk once
    for k positions, hint layers once for k − 1, the head's block at each of its k − 1 turns, and the LM head at each
    token; with a shortlist of m twice (once if hints wait for no draft) and m rows a token.
    """
    backbone, readout = student.backbone, student.readout
    size = next(student.parameters()).element_size()
    trunk = _matrices(backbone.base_model) - embeddings(backbone).weight.numel()
    lm_head = head(backbone).weight.numel()
    if isinstance(readout, ArgmaxReadout):
        encoder = _matrices(readout)
        return StepCost(2 * (2 * k * trunk + k * (lm_head + encoder)), size * (trunk + lm_head + encoder))
    assert isinstance(readout, SequentialReadout)
    hints = _matrices(readout.layers) if readout.config.hints != "none" else 0
    if readout.config.hints == "adapter":  # the trunk's own layers again
        hints += trunk * readout.layers.config.num_hidden_layers // backbone.config.num_hidden_layers
    block = _matrices(readout) - (_matrices(readout.layers) if readout.config.hints != "none" else 0)
    block -= readout.positions.weight.numel() + (readout.queries.weight.numel() if hints else 0)
    if k == 1:
        return StepCost(2 * (trunk + lm_head), size * (trunk + lm_head))
    m, width = min(readout.config.shortlist, len(head(backbone).weight)), head(backbone).weight.shape[1]
    drafts = (k - 2) * lm_head if readout.config.draft == "bigram" else 0
    first = readout.entry.weight.numel() + readout.block.qkv.weight.numel()  # the trunk state's keys and values
    flops = k * trunk + (k - 1) * (hints + block + m * width) + first + k * lm_head + drafts
    reads = trunk + hints + (k - 1) * block + first + drafts
    passes = 1 if readout.config.draft == "none" else 2
    reads += passes * lm_head + (k - 1) * m * width if m else k * lm_head
    return StepCost(2 * flops, size * reads)


def _matrices(module: nn.Module) -> int:
    """Parameters in matrices."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)
