"""Computing a training step in pieces, so that it needs less memory.

`in_chunks` and `loss_in_chunks` compute what follows the LM head for a few rows at a time, because logits over the whole
vocabulary would be the largest tensors of a step. `checkpoint_layers` keeps only the input of each transformer layer and
computes the layer again in the backward pass (activation checkpointing).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

CHUNK = 1024  # tokens whose logits exist at a time, where nobody chose


def in_chunks(function: Callable[[slice], tuple[Tensor, ...]], rows: int, size: int) -> tuple[Tensor, ...]:
    """`function` of slices of at most `size` of so many rows, its results concatenated."""
    parts = [function(part) for part in _slices(rows, size)]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


def loss_in_chunks(
    function: Callable[..., tuple[Tensor, ...]], states: Sequence[Tensor], head: nn.Module, size: int
) -> tuple[Tensor, ...]:
    """A loss over rows of states, summed over at most `size` rows at a time, with its gradients made on the way.

    The gradients of a sum need not wait for the backward pass, which only scales them: those of a chunk are made as soon as
    its loss is, so that no logits outlive their chunk and none are made twice. Weights' gradients are summed in float32.
    Under ZeRO 3, where the weights of a module are gone once it has run, chunks are computed again instead.

    Args:
        function: (rows, those rows of each of the states) → ((r,) loss, further results without gradients).
        states: (R, …) each.
        head: what the function reads beside the states; whatever it trains gets its gradients.
        size: of a chunk.
    Returns:
        The scalar loss, and the further results, concatenated.
    """
    slices, weights = _slices(len(states[0]), size), list(head.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*states, *trained)):
        if not any(hasattr(weight, "ds_id") for weight in weights):
            return _LossInChunks.apply(function, slices, len(states), *states, *trained)  # type: ignore[no-untyped-call]
        again = functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        return _total([again(rows, *(x[rows] for x in states)) for rows in slices])
    return _total([function(rows, *(x[rows] for x in states)) for rows in slices])


def _slices(rows: int, size: int) -> list[slice]:
    count = max(1, -(-rows // size))
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _total(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    loss_R, *others = (torch.cat(results) for results in zip(*parts, strict=True))
    return loss_R.sum(), *others


class _LossInChunks(torch.autograd.Function):
    """See `loss_in_chunks`; the tensors are the states, then the trained weights."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., tuple[Tensor, ...]], slices: list[slice], n_states: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        states, weights = tensors[:n_states], tensors[n_states:]
        of_states = [torch.empty_like(x) for x in states if x.requires_grad]
        of_weights = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        parts = []
        for rows in slices:
            pieces = [x[rows].detach().requires_grad_(x.requires_grad) for x in states]
            with torch.enable_grad():
                # Views: counters of operations hook what modules read, and autograd.grad knows no hooks of leaves.
                loss, *others = function(rows, *(x.view_as(x) for x in pieces))
                wanted = [*(x for x in pieces if x.requires_grad), *weights]
                made = torch.autograd.grad(loss.sum(), wanted)
            for whole, part in zip(of_states, made, strict=False):
                whole[rows] = part
            for total, part in zip(of_weights, made[len(of_states) :], strict=True):
                total += part
            parts.append((loss.detach(), *others))
            del pieces, loss, others, wanted, made, part  # before the next chunk makes its own
        ctx.save_for_backward(*of_states, *of_weights)
        ctx.dtypes = [x.dtype if x.requires_grad else None for x in tensors]
        loss, *others = _total(parts)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        made = iter(ctx.saved_tensors)
        grads = ((next(made) * grad).to(dtype) if dtype else None for dtype in ctx.dtypes)
        return None, None, None, *grads


def checkpoint_layers(module: nn.Module) -> None:
    """Keep only the inputs of all transformer layers in a module, and compute each again in its backward pass.

    transformers' own gradient checkpointing takes caches away from layers, and with them what blocks read. Keys and
    values that leave a layer through a cache of `kforcing.staircase` stay part of its graph.

    Raises ValueError when the module has no layer of transformers.
    """
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no layers of transformers to compute again; switch this off")
    for layer in layers:
        layer.forward = _checkpointed(layer.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call
