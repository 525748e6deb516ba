"""Staircase attention against one softmax under a dense mask."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kforcing.attention import staircase as attention
from kforcing.attention.staircase import Causal, Chunk, Staircase, staircase_attention
from kforcing.metrics.flops import flop_counter
from kforcing.reference import dense_attention, staircase_mask

SCALE = 0.3


def full(B, N, draws=1):
    return torch.arange(N).repeat_interleave(draws).expand(B, -1)


def sampled(B, N, W, seed=0):
    """Sorted anchors that repeat, and differ from row to row."""
    return torch.randint(0, N, (B, W), generator=torch.Generator().manual_seed(seed)).sort(dim=1).values


def tensors(anchors, N, L, T, H=4, J=2, E=8, dtype=torch.float32, seed=0):
    """Queries, context and window keys and values, laid out as a model leaves them."""
    g = torch.Generator().manual_seed(seed)
    B, W = anchors.shape

    def make(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    q, k, v = make(B, W * L, H, E).transpose(1, 2), make(B, N, J, E).transpose(1, 2), make(B, N, J, E).transpose(1, 2)
    return [x.requires_grad_() for x in (q, k, v, make(B, J, W, T, E), make(B, J, W, T, E))]


def errors(inputs, anchors, N, causal=False):
    """Largest error of the output, and of each gradient relative to its largest entry."""
    out = staircase_attention(*inputs, Staircase(anchors, N, causal), SCALE)
    expected = dense_attention(*inputs, anchors, SCALE)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    mine, theirs = (torch.autograd.grad(x, inputs, weights) for x in (out, expected))
    relative = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, theirs, strict=True)]
    return (out - expected).abs().max().item(), max(relative)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("causal", [False, True])
def test_full_windows_equal_the_dense_softmax_with_its_gradients(k, heads, causal):
    for N, draws in ((1, 1), (7, 1), (7, 3), (70, 1)):
        anchors = full(2, N, draws)
        inputs = tensors(anchors, N, k, k, *heads)
        assert isinstance(Staircase(anchors, N, causal).calls[0], Causal if causal else Chunk)
        error, relative = errors(inputs, anchors, N, causal)
        assert error < 1e-5
        assert relative < 1e-5


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("k", range(1, 9))
def test_sampled_windows_with_repeated_anchors_are_the_dense_softmax_with_its_gradients(monkeypatch, k, heads):
    monkeypatch.setattr(attention, "WINDOWS_A_CALL", 16)
    for N, W in ((9, 1), (9, 5), (40, 33), (20, 64)):
        anchors = sampled(3, N, W, seed=k)
        error, relative = errors(tensors(anchors, N, k, k, *heads), anchors, N)
        assert error < 1e-5
        assert relative < 1e-5


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("before", [1, 4, 8])
def test_later_reads_see_the_earlier_ones_of_their_window(k, before):
    anchors = sampled(2, 11, 6)
    error, relative = errors(tensors(anchors, 11, k, before + k), anchors, 11)
    assert error < 1e-5
    assert relative < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_windows_over_512_tokens_equal_the_dense_softmax(causal):
    anchors = full(1, 512)
    error, relative = errors(tensors(anchors, 512, 4, 4, 2, 1, 8), anchors, 512, causal)
    assert error < 1e-5
    assert relative < 1e-5


def test_anchors_may_be_in_any_order():
    anchors = torch.tensor([[5, 0, 3, 3], [1, 6, 0, 2]])
    error, relative = errors(tensors(anchors, 7, 2, 2), anchors, 7)
    assert error < 1e-5
    assert relative < 1e-5


def test_the_gradient_equals_the_numerical_gradient():
    anchors = sampled(2, 5, 3)
    inputs = tensors(anchors, 5, 2, 3, 2, 1, 4, dtype=torch.float64)
    stairs = Staircase(anchors, 5, causal=False)
    assert torch.autograd.gradcheck(lambda *x: staircase_attention(*x, stairs, SCALE), inputs)


@pytest.mark.parametrize("scale", [SCALE, 1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_the_error_in_bf16_is_that_of_one_stock_kernel_over_the_same_scores(causal, scale):
    """With scores of size 2 and of size 8, whose own rounding would be seen."""
    N, k, E = 40, 4, 64
    anchors = full(2, N)
    rounded = [x.detach().requires_grad_() for x in tensors(anchors, N, k, k, E=E, dtype=torch.bfloat16)]
    exact = [x.detach().float().requires_grad_() for x in rounded]
    weights = torch.randn(2, N * k, 4, E, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = dense_attention(*exact, anchors, scale)
    truth = [truth, *torch.autograd.grad(truth, exact, weights.float())]

    def stock(q, keys, values, own_keys, own_values):
        every = [torch.cat([x, own.flatten(2, 3)], dim=2) for x, own in ((keys, own_keys), (values, own_values))]
        mask = staircase_mask(anchors, N, k)[:, :, N:]
        return scaled_dot_product_attention(q, *every, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)

    def distances(out):
        assert out.dtype == torch.bfloat16
        mine = [out, *torch.autograd.grad(out, rounded, weights)]
        return torch.stack([(a.float() - b).norm() / b.norm() for a, b in zip(mine, truth, strict=True)])

    staircase = distances(staircase_attention(*rounded, Staircase(anchors, N, causal), scale))
    assert (staircase < 1.5 * distances(stock(*rounded))).all()
    assert staircase.max() < 0.01


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_tensor_is_kept_when_gradients_are_off(mode):
    anchors = sampled(2, 9, 4)
    inputs = tensors(anchors, 9, 2, 2)
    with mode():
        queries = inputs[0] * 1
        out = staircase_attention(queries, *inputs[1:], Staircase(anchors, 9, False), SCALE)
    alive = weakref.ref(queries)
    del queries
    assert out.grad_fn is None
    assert alive() is None


@pytest.mark.parametrize("causal", [False, True])
def test_cost_is_linear_in_the_entries_of_a_block(causal):
    N = 128
    anchors = full(1, N)
    flops = {}
    for k in (1, 2, 4, 8):
        inputs = tensors(anchors, N, k, k, 4, 4, 16)
        with flop_counter() as counter:
            staircase_attention(*inputs, Staircase(anchors, N, causal), SCALE).sum().backward()
        own = 7 * 2 * 4 * N * k * k * 16  # products inside the windows: two forward, five backward
        flops[k] = counter.get_total_flops() - own
    assert {k: f / flops[1] for k, f in flops.items()} == {k: pytest.approx(k, rel=1e-6) for k in flops}


def test_chunks_leave_out_the_context_beyond_their_last_anchor():
    calls = Staircase(full(3, 200), 200, causal=False).calls
    assert [(c.windows.start, c.end, len(c.anchors_BC)) for c in calls] == [
        (0, 64, 1),
        (64, 128, 1),
        (128, 192, 1),
        (192, 200, 1),
    ]
    rows = torch.tensor([[0, 2, 9], [1, 1, 4]])
    (call,) = Staircase(rows, 20, causal=True).calls
    assert call.end == 10
    mask = call.mask(2, torch.float32)
    assert mask.shape == (2, 1, 6, 10)
    assert (mask[:, 0, ::2] == 0).sum(-1).tolist() == [[1, 3, 10], [2, 2, 5]]
    assert mask.stride(-2) % 16 == 0


@pytest.mark.parametrize("width", [8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_gpu_kernels_accept_the_shapes_and_types_of_their_arguments(causal, dtype, width):
    """On the meta device, where kernels know shapes and types but compute nothing."""
    N, L = 50, 3
    (call,) = Staircase(full(2, N), N, causal).calls
    with torch.device("meta"):
        q, k, v = (torch.empty(2, N * L if h == 4 else N, h, width, dtype=dtype).transpose(1, 2) for h in (4, 2, 2))
        queries = call.fold(attention._by_window(q, N, 2))
        mask = None if causal else torch.empty(1, 1, queries.shape[2], N, dtype=dtype)
        out, lse = attention._kernel(queries, k, v, mask, SCALE)
        assert out.shape == queries.shape
        assert (lse.shape, lse.dtype) == (queries.shape[:3], torch.float32)
        grads = attention._kernel_backward(out, queries, k, v, out, lse, mask, SCALE)
    assert [g.shape for g in grads] == [queries.shape, k.shape, v.shape]


@pytest.mark.parametrize(("heads", "width"), [((9, 3), 64), ((4, 4), 20), ((4, 4), 64)], ids=str)
def test_the_masked_gpu_kernel_gets_outputs_in_the_memory_layout_that_it_assumes(monkeypatch, heads, width):
    (H, J), N, L, B = heads, 50, 3, 2
    backward, given = torch.ops.aten._scaled_dot_product_efficient_attention_backward, []

    def intercepted(grad, q, k, v, bias, out, lse, *args, **kwargs):
        given.append((out, lse))
        return backward(grad, q, k, v, bias, out, lse, *args, **kwargs)

    ops = SimpleNamespace(_scaled_dot_product_efficient_attention_backward=intercepted)
    monkeypatch.setattr(attention, "aten", ops)
    (call,) = Staircase(full(B, N), N, False).calls
    with torch.device("meta"):
        q, k = (torch.empty(B, n, h, width, dtype=torch.bfloat16).transpose(1, 2) for n, h in ((N * L, H), (N, J)))
        queries = call.fold(attention._by_window(q, N, J))
        mask = torch.empty(1, 1, queries.shape[2], N, dtype=torch.bfloat16)
        lse = torch.empty(queries.shape[:3], dtype=torch.float32)
        attention._kernel_backward(queries, queries, k, k, queries, lse, mask, SCALE)
    ((out, lse),) = given
    assert out.transpose(1, 2).is_contiguous()
    assert lse.stride(0) % 8 == lse.stride(1) % 8 == 0
