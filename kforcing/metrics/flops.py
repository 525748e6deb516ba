"""FLOPs and bytes of a decoding step, counted while the real code runs, and predicted from parameter counts.

At a small batch the time of a step is that of reading weights from memory; at a large batch it is that of arithmetic. This
module counts both: FLOPs of matrix products and attention (a multiply-add is two), and the bytes of weights that a step
reads (a weight that is read twice counts twice).
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
from kforcing.readout.base import Student, as_student
from kforcing.readout.sequential import SequentialReadout


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def flop_counter() -> FlopCounterMode:
    """A context manager whose `get_total_flops()` counts matrix products and attention, also the CPU's attention kernels."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


class WeightReads(TorchDispatchMode):
    """Counts the bytes of a module's weights that operations read. A gather counts the rows that it takes."""

    GATHERS = (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor)

    def __init__(self, module: nn.Module):
        super().__init__()
        self.storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and add the bytes of weights that it reads."""
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
    """FLOPs and bytes of one cached decoding step of one sequence, which reads k tokens and makes k tokens."""

    flops: float
    bytes: float


@torch.no_grad()
def measured_step(student: PushForwardLM, k: int, context: int) -> StepCost:
    """Count a real step whose cache holds `context` tokens."""
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


@dataclass(frozen=True)
class MatrixSizes:
    """Numbers of weights in a model's matrices, by which a position is multiplied. Tables that are looked up do not count."""

    trunk: float
    lm_head: int
    hints: float = 0
    """Hint layers of their own."""
    adapted: float = 0
    """The trunk's own layers that hints pass through again."""
    head: float = 0
    """The read-out's own matrices, without hint layers and low-rank head."""
    low_rank: float = 0
    """The low-rank head that chooses candidates."""


def matrix_sizes(model: Any) -> MatrixSizes:
    """The sizes of a causal LM of transformers or a student. Of experts, those count that a token is sent to."""
    student = as_student(model)
    backbone: Any = student.backbone if student else model
    trunk = _matrices(backbone.base_model) - embeddings(backbone).weight.numel()
    lm_head = head(backbone).weight.numel()
    if not student:
        return MatrixSizes(trunk, lm_head)
    tables, low_rank, hints = (
        sum(_matrices(m) for n in names if (m := getattr(student.readout, n, None)) is not None)
        for names in (("queries", "positions"), ("candidates",), ("layers",))
    )
    adapted = 0.0
    if hints and student.design.sequential.hints == "adapter":
        layers: Any = student.readout.layers
        adapted = trunk * layers.config.num_hidden_layers / backbone.config.num_hidden_layers
    own = _matrices(student.readout) - hints - tables - low_rank
    return MatrixSizes(trunk, lm_head, hints, adapted, own, low_rank)


def predicted_ar_step(backbone: PreTrainedModel) -> StepCost:
    """One step of plain AR decoding, which reads every matrix once for one position; without attention over the context."""
    sizes = matrix_sizes(backbone)
    matrices = sizes.trunk + sizes.lm_head
    return StepCost(2 * matrices, next(backbone.parameters()).element_size() * matrices)


def attention_step(backbone: PreTrainedModel, entries: int, context: int) -> StepCost:
    """What attention adds for each sequence of a batch: it reads the context's keys and values once for `entries` queries."""
    config: Any = backbone.config
    heads, width = key_heads(backbone)
    size = next(backbone.parameters()).element_size()
    columns = config.num_hidden_layers * context * width
    return StepCost(4 * entries * columns * config.num_attention_heads, 2 * size * columns * heads)


def predicted_step(student: Student, k: int, exact: bool = False) -> StepCost:
    """A step's FLOPs and bytes from parameter counts (matrices × positions), without attention over the context.

    The paper's read-out reads trunk, noise encoder and LM head once, for 2k, k and k positions. The sequential read-out
    reads the trunk once for k positions, hint layers once for k − 1 positions, the head's block in each of its k − 1
    turns, and the LM head for each token. With a shortlist of m it reads the LM head twice (once if hints see no
    draft) and m of its rows for each token. With a low-rank head it reads the LM head once, and that head for each later
    token. In exact mode the LM head scores all k tokens that are read, and no longer
    scores token 1 and the hints of a student without draft in one pass.
    """
    backbone, readout, sizes = student.backbone, student.readout, matrix_sizes(student)
    size = next(backbone.parameters()).element_size()
    trunk, lm_head, block, low_rank = sizes.trunk, sizes.lm_head, sizes.head, sizes.low_rank
    if isinstance(readout, ArgmaxReadout):
        return StepCost(2 * (2 * k * trunk + k * (lm_head + block)), size * (trunk + lm_head + block))
    assert isinstance(readout, SequentialReadout)
    hints = sizes.hints + sizes.adapted
    if k == 1:
        return StepCost(2 * (trunk + lm_head), size * (trunk + lm_head))
    m, width = min(readout.config.shortlist, len(head(backbone).weight)), head(backbone).weight.shape[1]
    drafts = (k - 2) * lm_head if readout.config.draft == "bigram" else 0
    first = readout.entry.weight.numel() + readout.block.qkv.weight.numel()  # the trunk state's keys and values
    if readout.config.draft_rank:
        flops = (
            k * trunk
            + (k - 1) * (hints + block + low_rank + m * width)
            + first
            + (k if exact else 1) * lm_head
            + drafts
        )
        reads = trunk + hints + (k - 1) * (block + low_rank + m * width) + first + drafts + lm_head
        return StepCost(2 * flops, size * reads)
    flops = k * trunk + (k - 1) * (hints + block + m * width) + first + k * lm_head + drafts
    reads = trunk + hints + (k - 1) * block + first + drafts
    flops += (k - 1) * lm_head if exact else 0
    passes = 1 if readout.config.draft == "none" and not exact else 2
    reads += passes * lm_head + (k - 1) * m * width if m else k * lm_head
    return StepCost(2 * flops, size * reads)


def _matrices(module: Any) -> float:
    """Weights that a token is multiplied by; of experts, which are stacked in three dimensions, those that it is sent to."""
    config = getattr(module, "config", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    return sum(p.numel() * (share if p.ndim == 3 else 1) for p in module.parameters() if p.ndim in (2, 3))
