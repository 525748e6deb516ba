"""A training step in chunks and with layers computed again, against the same step at once."""

import copy
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kforcing import Design, NoiseConfig, PushForwardLM
from kforcing.attention.reader import BlockReader
from kforcing.attention.windows import Windows
from kforcing.chunking import checkpoint_layers, in_chunks, loss_in_chunks
from kforcing.coupling import COUPLINGS
from kforcing.distillation import teachers as rollout
from kforcing.distillation.losses import hard_target_loss, next_token_loss
from kforcing.distillation.steps import StudentStep, WindowBatch, measured_windows
from kforcing.distillation.teachers import ARTeacher, StudentTeacher
from kforcing.metrics.flops import flop_counter
from kforcing.noise import uniform
from kforcing.readout import argmax as readout
from kforcing.readout import sequential
from tests.models import VOCAB, make_backbone, make_sequential

B, N, W, K = 2, 12, 10, 4


def batch(soft=None, own=False):
    """Rolled-out windows of a tiny teacher, with its labels or without."""
    g = torch.Generator().manual_seed(0)
    context = torch.randint(0, VOCAB, (B, N), generator=g)
    anchors = torch.stack([torch.randperm(N, generator=g)[:W].sort().values for _ in range(B)])
    noise = uniform(0, torch.arange(B)[:, None, None], anchors[..., None], torch.arange(K))
    windows = Windows(context, anchors, noise, torch.ones(B))
    tokens, labels = ARTeacher(make_backbone(scale=2.0), COUPLINGS["gumbel"]).labelled_rollout(windows, soft or 1)
    return WindowBatch(windows, tokens, labels if soft else None, torch.tensor([True, False]) if own else None)


def argmax_student(name="llama"):
    torch.manual_seed(0)
    return PushForwardLM.from_backbone(make_backbone(name, scale=2.0), K, Design(noise=NoiseConfig(0.25, 8.0))).eval()


def sequential_student(**parts):
    torch.manual_seed(0)
    return make_sequential(make_backbone(scale=2.0), K, **parts)


STEPS = {
    "hard": (argmax_student, "hard", {}),
    "hard, sides": (lambda: sequential_student(shortlist=3, draft="bigram"), "hard", {}),
    "shipped labels": (lambda: sequential_student(freeze_trunk=False), "soft", {"soft": 5}),
    "local labels": (sequential_student, "soft", {}),
    "local labels, sides, own windows": (
        lambda: sequential_student(shortlist=3, hints="adapter", hint_layers=1),
        "soft",
        {"own": True},
    ),
}


def outcome(build, loss, data, chunk, again=False):
    """Sums and gradients of a step."""
    student = build()
    step = StudentStep(student, loss, chunk)
    if again:
        checkpoint_layers(step)
    sums = step(batch(**data))
    sums.loss.backward()
    return sums, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def assert_same(one, other):
    (sums, gradients), (expected, expected_gradients) = one, other
    torch.testing.assert_close(sums.loss, expected.loss, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums.nll_K, expected.nll_K, rtol=1e-6, atol=1e-5)
    assert torch.equal(sums.match_K, expected.match_K)
    assert torch.equal(sums.block, expected.block)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():
        largest = expected_gradient.abs().max().clamp(min=1e-3)
        assert (gradients[name] - expected_gradient).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("chunk", [1, 12, 79])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_in_chunks_equals_a_step_over_all_rows_at_once(name, chunk):
    assert_same(outcome(*STEPS[name], chunk), outcome(*STEPS[name], 10**6))


@pytest.mark.parametrize("name", STEPS)
def test_activation_checkpointing_does_not_change_the_step(name):
    assert_same(outcome(*STEPS[name], 12, again=True), outcome(*STEPS[name], 10**6))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_activation_checkpointing_does_not_change_the_step_of_other_backbones(name):
    build = lambda: argmax_student(name)  # noqa: E731
    assert_same(outcome(build, "hard", {}, 12, again=True), outcome(build, "hard", {}, 12))


def test_match_is_that_of_every_fourth_window_by_the_read_outs_own_pick():
    student, data = argmax_student(), batch()
    right = (student.tokens(data.windows) == data.targets_BWK)[:, 2::4].flatten(0, 1).float()
    assert list(measured_windows(W)) == [2, 6]
    with torch.no_grad():
        sums = StudentStep(student, "hard", 8)(data)
    torch.testing.assert_close(sums.match_K, right.sum(0) * 5)
    torch.testing.assert_close(sums.block, right.prod(-1).sum() * 5)


class Largest(TorchDispatchMode):
    """Notes the most rows of a tensor over the whole vocabulary that any operation makes."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, x.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("name", STEPS)
def test_logits_of_all_tokens_never_exist_at_once(monkeypatch, name):
    for module in (readout, sequential):  # where the student draws by itself
        monkeypatch.setattr(module, "CHUNK", 8)
    build, loss, data = STEPS[name]
    student, data = build(), batch(**data)
    for chunk, rows in ((8, 8), (10**6, B * W * K)):
        with Largest(VOCAB) as largest:
            StudentStep(student, loss, chunk)(data).loss.backward()
        assert largest.rows <= rows
    assert largest.rows == B * W * K


def test_logits_of_all_tokens_never_exist_at_once_in_ar_training():
    backbone = make_backbone(scale=2.0)
    ids = torch.randint(0, VOCAB, (4, 20), generator=torch.Generator().manual_seed(0))
    gradients = []
    for chunk, rows in ((8, 8), (10**6, 76)):
        backbone.zero_grad()
        with Largest(VOCAB) as largest:
            next_token_loss(backbone, ids, chunk).loss.backward()
        gradients.append([p.grad.clone() for p in backbone.parameters()])
        assert largest.rows == rows
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_logits_of_all_tokens_never_exist_at_once_in_rollouts(monkeypatch):
    for module in (readout, rollout, sequential):
        monkeypatch.setattr(module, "CHUNK", 8)
    windows, backbone = batch().windows, make_backbone(scale=2.0)
    for student in (argmax_student(), sequential_student(), sequential_student(shortlist=3, draft="none")):
        with Largest(VOCAB) as largest:
            tokens = StudentTeacher(student).rollout(windows)
        assert largest.rows <= 8
        assert torch.equal(tokens, student.draw(windows).tokens_BWK)
    with Largest(VOCAB) as largest:
        ARTeacher(backbone, COUPLINGS["inverse_cdf"]).labelled_rollout(windows, 3)
    assert largest.rows <= 8


@pytest.mark.parametrize("prefix", [False, True])
def test_rollouts_pass_all_windows_through_the_network_together(monkeypatch, prefix):
    """However few logits exist at a time."""
    windows, passed, read = batch().windows, [], BlockReader.read
    if prefix:
        windows = dataclasses.replace(windows, prefix_BWP=torch.zeros(B, W, 2, dtype=torch.int64))

    def counted(reader, block_BWLD):
        passed.append(block_BWLD.shape[1])
        return read(reader, block_BWLD)

    monkeypatch.setattr(BlockReader, "read", counted)
    for student, reads in ((argmax_student(), 1), (sequential_student(), 1 + prefix)):
        for chunk in (1, 10**6):
            for module in (readout, sequential):
                monkeypatch.setattr(module, "CHUNK", chunk)
            passed.clear()
            StudentTeacher(student).rollout(windows)
            assert passed == [W] * reads


def test_results_come_in_the_order_of_rows_whatever_the_chunk():
    x = torch.arange(7.0, requires_grad=True)
    for size in (1, 3, 7, 100):
        twice, parity = in_chunks(lambda rows: (x[rows] * 2, x[rows].detach() % 2 == 0), 7, size)
        assert twice.tolist() == [0, 2, 4, 6, 8, 10, 12]
        assert parity.tolist() == [True, False] * 3 + [True]
        (gradient,) = torch.autograd.grad(twice.sum(), x)
        assert gradient.tolist() == [2] * 7


def kept_numbers(student):
    """How many numbers a step keeps for its backward pass."""
    saved = []

    def keep(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = StudentStep(student, "hard")(batch()).loss
    loss.backward()
    return sum(saved)


def test_only_the_inputs_of_layers_are_kept():
    student = argmax_student()
    before = kept_numbers(student)
    checkpoint_layers(student)
    assert kept_numbers(student) < 0.5 * before


def test_activation_checkpointing_refuses_a_module_without_layers_of_transformers():
    with pytest.raises(ValueError, match="Linear has no layers of transformers"):
        checkpoint_layers(torch.nn.Linear(2, 2))


def test_the_gradient_of_a_head_in_half_precision_is_no_worse_for_chunks():
    torch.manual_seed(0)
    exact, states, targets = torch.nn.Linear(32, 64, bias=False), torch.randn(512, 32), torch.randint(0, 64, (512,))
    half = copy.deepcopy(exact).bfloat16()
    errors = []
    for head, size in ((exact, 512), (half, 512), (half, 8)):
        head.zero_grad()
        hard_target_loss(
            head, states.to(head.weight.dtype)[None, :, None], targets[None, :, None], size
        ).loss.backward()
        errors.append((head.weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm())
    assert errors[0] == 0 < errors[2] < 1.2 * errors[1] < 0.01


def test_gradients_that_were_made_in_the_forward_pass_are_scaled_by_the_later_gradient():
    head, states = torch.nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)

    def squares(rows, part):
        return head(part).square().sum(-1), part.detach()[:, 0]

    loss, first = loss_in_chunks(squares, [states], head, 2)
    assert torch.equal(first, states.detach()[:, 0])
    (3 * loss).backward()
    made = [states.grad, head.weight.grad, head.bias.grad]
    expected = torch.autograd.grad(3 * head(states).square().sum(), [states, head.weight, head.bias])
    torch.testing.assert_close(made, list(expected))


def test_the_flop_counter_sees_each_operation_of_a_step_once():
    states, head = torch.randn(6, 4, requires_grad=True), torch.nn.Linear(4, 8, bias=False)
    targets = torch.arange(6)
    with flop_counter() as counter:
        hard_target_loss(head, states[None, :, None], targets[None, :, None], 2).loss.backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 4 * 8  # logits, the states' gradient, the head's


def test_zero_rows_give_empty_results():
    states, head = torch.zeros(0, 3, requires_grad=True), torch.nn.Linear(3, 5)
    loss, sums = loss_in_chunks(lambda rows, part: (head(part).sum(-1), part.detach().sum(-1)), [states], head, 4)
    assert (loss.item(), len(sums)) == (0, 0)
    assert [len(x) for x in in_chunks(lambda rows: (torch.arange(7)[rows],), 0, 4)] == [0]
