"""Staircase attention: the windows' blocks over one shared context, at a cost that is linear in the entries of a block.

    context part   an entry of window w sees context tokens 0 … anchor(w). Stock attention kernels compute this part.
    window part    it also sees the entries of its own window up to itself. This module computes a softmax over T scores.

The two parts are merged by their log-sum-exps. The backward function of a kernel rebuilds the probabilities as
exp(score − lse) and subtracts Σ grad · out from their gradients. When it is called with the *merged* output and log-sum-exp,
it returns the exact gradients of its part (ring attention: Liu, Zaharia, Abbeel 2023). So autograd, which cannot
differentiate a kernel's log-sum-exp, does not have to.

How kernels are called. The windows are divided into chunks, and each chunk is one call: its queries are the entries of the
windows, its keys are the context up to the last anchor of the chunk, and its mask says which keys each window sees. On GPUs,
in half precision, full windows (every position is an anchor, each equally often) use plain causal attention instead: entry
l of all windows is one head of N queries and N keys. On CPUs chunks are faster than the causal kernel, which skips less of
the upper triangle. No recipe makes the causal call so far: all recipes sample windows or compute in float32, and rollouts
always compute in float32. On a GPU, the calls under masks have run in float32 and bfloat16; the causal call has not.

Shapes: B batch, N context, W windows, C windows of a call, L entries of this read, T entries of a window so far (the last L
are this read's), H query heads, J key heads, G = H / J, E width of a head, S = W · L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

aten: Any = torch.ops.aten

# Enough queries for a kernel to work on, few enough to leave out most of the context that no window of the call sees.
WINDOWS_A_CALL = 64


@dataclass(frozen=True)
class Chunk:
    """A call for some windows: their entries, under a mask, against the context up to their last anchor."""

    windows: slice
    end: int
    anchors_BC: Tensor
    """int64 anchors; one row alone when all rows have the same anchors."""

    def fold(self, x_BJWGLE: Tensor) -> Tensor:
        """The entries of the call as its queries: (B, J, C·G·L, E)."""
        return x_BJWGLE[:, :, self.windows].flatten(2, 4)

    def unfold(self, y: Tensor, into_BJWGLE: Tensor) -> None:
        """Write the result of the call to the places of its queries."""
        part = into_BJWGLE[:, :, self.windows]
        part.copy_(y.view(part.shape))

    def mask(self, repeats: int, dtype: torch.dtype) -> Tensor:
        """The additive attention mask (B, 1, C·repeats, end): 0 where a window may attend, −inf elsewhere."""
        columns = torch.arange(self.end, device=self.anchors_BC.device)
        hidden = (columns > self.anchors_BC[..., None]).repeat_interleave(repeats, dim=1)[:, None]
        wide = -(-self.end // 16) * 16  # GPU kernels need aligned rows of the mask
        mask = torch.zeros(*hidden.shape[:-1], wide, dtype=dtype, device=hidden.device)[..., : self.end]
        return mask.masked_fill_(hidden, -torch.inf)


@dataclass(frozen=True)
class Causal:
    """The single call for full windows: entry l of all windows is a head of its own, with N queries."""

    end: int
    """N."""
    draws: int
    """Windows of each anchor."""

    def fold(self, x_BJWGLE: Tensor) -> Tensor:
        """(B, J·draws·G·L, N, E): heads of queries in the order of their key heads."""
        return x_BJWGLE.unflatten(2, (self.end, self.draws)).permute(0, 1, 3, 4, 5, 2, 6).flatten(1, 4)

    def unfold(self, y: Tensor, into_BJWGLE: Tensor) -> None:
        """Write the result of the call to the places of its queries."""
        B, J, _, G, L, E = into_BJWGLE.shape
        back = y.view(B, J, self.draws, G, L, self.end, E).permute(0, 1, 5, 2, 3, 4, 6)
        into_BJWGLE.unflatten(2, (self.end, self.draws)).copy_(back)


class Staircase:
    """The kernel calls that let each window see its context. They are the same for all layers and reads of a batch.

    Args:
        anchors_BW: int64, the position of the last context token that each window sees. Sorted anchors cost least.
        n_context: number of tokens of the context.
        causal: whether full windows use the causal kernel.
    """

    def __init__(self, anchors_BW: Tensor, n_context: int, causal: bool):
        draws, rest = divmod(anchors_BW.shape[1], n_context)
        every = torch.arange(n_context, device=anchors_BW.device).repeat_interleave(draws)
        full = (anchors_BW == every).all() if draws and not rest else torch.zeros_like(anchors_BW[0, 0])
        last = [chunk.amax() for chunk in anchors_BW.split(WINDOWS_A_CALL, dim=1)]
        # This is the only time that the host waits for the device.
        *ends, is_full = torch.stack([*last, full.to(anchors_BW.dtype)]).tolist()
        self.windows = anchors_BW.shape[1]
        self.calls: list[Chunk | Causal]
        if is_full and causal:
            self.calls = [Causal(n_context, draws)]
        else:
            rows = (anchors_BW[:1] if is_full else anchors_BW).split(WINDOWS_A_CALL, dim=1)
            starts = range(0, self.windows, WINDOWS_A_CALL)
            self.calls = [
                Chunk(slice(w, w + WINDOWS_A_CALL), int(end) + 1, row)
                for w, end, row in zip(starts, ends, rows, strict=True)
            ]
        self._masks: dict[tuple[int, torch.dtype], list[Tensor | None]] = {}

    def masks(self, repeats: int, dtype: torch.dtype) -> list[Tensor | None]:
        """The masks of the calls, for `repeats` queries of each window and key head. The mask of a causal call is None."""
        if (repeats, dtype) not in self._masks:
            masks = [call.mask(repeats, dtype) if isinstance(call, Chunk) else None for call in self.calls]
            self._masks[repeats, dtype] = masks
        return self._masks[repeats, dtype]


def has_causal_kernel(x: Tensor) -> bool:
    """Whether the causal kernel is the faster one for full windows of tensors like this."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def staircase_attention(
    q_BHSE: Tensor,
    keys_BJNE: Tensor,
    values_BJNE: Tensor,
    own_keys_BJWTE: Tensor,
    own_values_BJWTE: Tensor,
    staircase: Staircase,
    scale: float,
) -> Tensor:
    """Attention of block entries to their context and to their own window: (B, S, H, E) in the dtype of the queries.

    Differentiable once, in all five tensors. Under autocast the tensors are cast to its dtype, as stock kernels do.

    Args:
        q_BHSE: queries, window by window.
        keys_BJNE: keys of the context. They are not copied.
        values_BJNE: values of the context.
        own_keys_BJWTE: keys of the windows' entries: those of earlier reads, then those of this read.
        own_values_BJWTE: values of the windows' entries.
        staircase: which context each window sees.
        scale: factor of the scores.
    """
    tensors, device = [q_BHSE, keys_BJNE, values_BJNE, own_keys_BJWTE, own_values_BJWTE], q_BHSE.device.type
    if torch.is_autocast_enabled(device):
        tensors = [x.to(torch.get_autocast_dtype(device)) for x in tensors]
    with torch.autocast(device, enabled=False):
        return _StaircaseAttention.apply(*tensors, staircase, scale)  # type: ignore[no-untyped-call]


class _StaircaseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        stairs: Staircase,
        scale: float,
    ) -> Tensor:
        q_BJWGLE = _by_window(q, stairs.windows, keys.shape[1])
        out_BSHE = torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device)
        out_BJWGLE = _by_window(out_BSHE.transpose(1, 2), stairs.windows, keys.shape[1])
        lse_BJWGL1 = torch.empty(*q_BJWGLE.shape[:-1], 1, dtype=_wide(q.dtype), device=q.device)
        G, L = q_BJWGLE.shape[3:5]
        for call, mask in zip(stairs.calls, stairs.masks(G * L, q.dtype), strict=True):
            out, lse = _kernel(call.fold(q_BJWGLE), keys[:, :, : call.end], values[:, :, : call.end], mask, scale)
            call.unfold(out, out_BJWGLE)
            call.unfold(lse[..., None], lse_BJWGL1)
        _merge_window(q_BJWGLE, own_keys, own_values, out_BJWGLE, lse_BJWGL1, scale)
        ctx.save_for_backward(q, keys, values, own_keys, own_values, out_BSHE, lse_BJWGL1)
        ctx.stairs, ctx.scale = stairs, scale
        return out_BSHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHE: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, own_keys, own_values, out_BSHE, lse_BJWGL1 = ctx.saved_tensors
        stairs: Staircase = ctx.stairs
        grad_BSHE = grad_BSHE.contiguous()
        q_BJWGLE, out_BJWGLE, grad_BJWGLE = (
            _by_window(x, stairs.windows, keys.shape[1])
            for x in (q, out_BSHE.transpose(1, 2), grad_BSHE.transpose(1, 2))
        )
        grad_q = torch.empty_like(grad_BSHE, dtype=q.dtype).transpose(1, 2)
        grad_q_BJWGLE = _by_window(grad_q, stairs.windows, keys.shape[1])
        grad_keys, grad_values = (torch.zeros_like(x, dtype=_wide(x.dtype)) for x in (keys, values))
        G, L = q_BJWGLE.shape[3:5]
        for call, mask in zip(stairs.calls, stairs.masks(G * L, q.dtype), strict=True):
            grad, q_call, out = (call.fold(x) for x in (grad_BJWGLE, q_BJWGLE, out_BJWGLE))
            lse, k, v = call.fold(lse_BJWGL1).squeeze(-1), keys[:, :, : call.end], values[:, :, : call.end]
            part_q, part_k, part_v = _kernel_backward(grad, q_call, k, v, out, lse, mask, ctx.scale)
            call.unfold(part_q, grad_q_BJWGLE)
            grad_keys[:, :, : call.end] += part_k
            grad_values[:, :, : call.end] += part_v
        grad_own_keys, grad_own_values = _window_backward(
            grad_BJWGLE, q_BJWGLE, own_keys, own_values, out_BJWGLE, lse_BJWGL1, grad_q_BJWGLE, ctx.scale
        )
        return grad_q, grad_keys.to(keys.dtype), grad_values.to(keys.dtype), grad_own_keys, grad_own_values, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums of values of `dtype` are kept."""
    return torch.promote_types(dtype, torch.float32)


def _wide_product(x_BJWXE: Tensor, y_BJWTE: Tensor) -> Tensor:
    """x @ yᵀ in at least float32, because stock kernels keep scores and their gradients in float32."""
    wide = _wide(x_BJWXE.dtype)
    return x_BJWXE.to(wide) @ y_BJWTE.to(wide).mT


def _by_window(x_BHSE: Tensor, windows: int, key_heads: int) -> Tensor:
    """A view with separate dimensions for key heads, windows, query heads of a key head, and entries: (B, J, W, G, L, E)."""
    return x_BHSE.unflatten(1, (key_heads, -1)).unflatten(3, (windows, -1)).transpose(2, 3)


def _window_scores(q_BJWXE: Tensor, own_keys_BJWTE: Tensor, L: int, scale: float) -> Tensor:
    """Scores of the X = G·L queries of a window for the T entries of that window; −inf for later entries."""
    scores_BJWXT = _wide_product(q_BJWXE, own_keys_BJWTE) * scale
    T, G = own_keys_BJWTE.shape[3], q_BJWXE.shape[3] // L
    later_LT = torch.ones(L, T, dtype=torch.bool, device=scores_BJWXT.device).triu(T - L + 1)
    return scores_BJWXT.masked_fill_(later_LT.repeat(G, 1), -torch.inf)


def _merge_window(
    q_BJWGLE: Tensor, own_keys: Tensor, own_values: Tensor, out_BJWGLE: Tensor, lse_BJWGL1: Tensor, scale: float
) -> None:
    """Add the window part to the output and log-sum-exp of the context part, in place."""
    scores_BJWXT = _window_scores(q_BJWGLE.flatten(3, 4), own_keys, q_BJWGLE.shape[4], scale)
    lse_BJWX1 = lse_BJWGL1.flatten(3, 4)
    merged_BJWX1 = torch.logaddexp(lse_BJWX1, scores_BJWXT.logsumexp(dim=-1, keepdim=True))
    own_BJWXE = scores_BJWXT.sub_(merged_BJWX1).exp_().to(own_values.dtype) @ own_values
    share = (lse_BJWX1 - merged_BJWX1).exp_().view_as(lse_BJWGL1)
    out_BJWGLE.copy_(torch.addcmul(own_BJWXE.view(out_BJWGLE.shape), out_BJWGLE, share))
    lse_BJWGL1.copy_(merged_BJWX1.view_as(lse_BJWGL1))


def _window_backward(
    grad_BJWGLE: Tensor,
    q_BJWGLE: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    out_BJWGLE: Tensor,
    lse_BJWGL1: Tensor,
    grad_q_BJWGLE: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the windows' keys and values. The gradient of the queries is added to that of the context part."""
    q, grad = q_BJWGLE.flatten(3, 4), grad_BJWGLE.flatten(3, 4)
    p_BJWXT = (_window_scores(q, own_keys, q_BJWGLE.shape[4], scale) - lse_BJWGL1.flatten(3, 4)).exp_()
    grad_values = p_BJWXT.to(grad.dtype).mT @ grad
    through_BJWX1 = (grad.to(p_BJWXT.dtype) * out_BJWGLE.flatten(3, 4)).sum(dim=-1, keepdim=True)
    grad_scores_BJWXT = (p_BJWXT * (_wide_product(grad, own_values) - through_BJWX1) * scale).to(q.dtype)
    grad_q_BJWGLE += (grad_scores_BJWXT @ own_keys).view(grad_q_BJWGLE.shape)
    return grad_scores_BJWXT.mT @ q, grad_values


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a stock kernel, causal when there is no mask. The log-sum-exp is float32 or wider."""
    if q.device.type == "cpu":
        causal = mask is None
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    q, k, v, width = *(_aligned(x) for x in (q, k, v)), v.shape[-1]
    if mask is None:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    else:
        bias = mask.expand(*q.shape[:3], -1)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False, scale=scale)
    return out[..., :width], lse[..., : q.shape[2]]


def _kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given the merged output and log-sum-exp."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=scale
        )
    width, n, end = v.shape[-1], q.shape[2], k.shape[2]
    grad, q, k, v, out = (_aligned(x) for x in (grad, q, k, v, out))
    # The kernels read the state of the generator for dropout alone, so any state will do.
    if mask is None:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, n, end, 0.0, True, seed, seed[:1], scale=scale
        )
    else:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        padded, bias = pad(lse, (0, -n % 32), value=torch.inf), mask.expand(*q.shape[:3], -1)
        # In half precision the kernel assumes that rows of the output are `heads · width` apart, and ignores the strides.
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        needed = [True, True, True, False]
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, bias, out, padded, seed, seed, 0.0, needed, False, scale=scale
        )
    return tuple(x[..., :width] for x in grads[:3])  # type: ignore[return-value]


def _aligned(x: Tensor) -> Tensor:
    """The tensor, padded with zeros to a width that is a multiple of 8, as GPU kernels require."""
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x
