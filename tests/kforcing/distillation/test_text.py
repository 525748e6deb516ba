"""Training on text: the labels of a window are the AR model's distributions along the text itself."""

import dataclasses

import pytest
import torch

from kforcing import Design, PushForwardLM, SequentialConfig
from kforcing.distillation.text import TEXT_LOSSES, TextBatch, TextStep
from tests.models import VOCAB, make_backbone, make_sequential

N, K = 14, 3


def batch(seed=0, rows=2):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, N), generator=g)
    anchors = torch.tensor([0, 3, 4, 10]).expand(rows, -1)
    return TextBatch(tokens, anchors, torch.rand(rows, 4, K, generator=g, dtype=torch.float64))


def distributions(model, b):
    """Log-probabilities of tokens 2 … K of each window, by whole passes: of the AR model and of the student."""
    teacher, student = [], []
    for row, anchors in zip(b.tokens_BN, b.anchors_BW, strict=True):
        logits = model.backbone(input_ids=row[None]).logits[0]
        for t in anchors.tolist():
            teacher.append(torch.stack([logits[t + j] for j in range(1, K)]))
    scores = student_scores(model, b)
    student = scores[:, :, 1:].flatten(0, 1)
    return torch.stack(teacher).log_softmax(-1), student.log_softmax(-1)


def student_scores(model, b):
    from kforcing.attention.windows import Windows

    places = b.anchors_BW[..., None] + 1 + torch.arange(K)
    tokens = torch.stack([row[p] for row, p in zip(b.tokens_BN, places, strict=True)])
    return model.scores(Windows(b.tokens_BN, b.anchors_BW, b.noise_BWK, torch.ones(2)), tokens).logits_BWKV


@pytest.mark.parametrize("loss", TEXT_LOSSES)
@pytest.mark.parametrize("chunk", [4, 1024])
def test_loss_is_the_sum_over_tokens_after_the_first(backbone, loss, chunk):
    model, b = make_sequential(backbone, K, hint_layers=1), batch()
    sums = TextStep(model, loss, chunk=chunk)(b)
    logp, logq = distributions(model, b)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    tv = (logp.exp() - logq.exp()).abs().sum(-1) / 2
    weight = torch.exp(-3 * (1 - tv))
    rejected = 1 - (1 - tv).cumprod(dim=-1)
    expected = {
        "kl": kl,
        "tv": 0.9 * tv + 0.1 * kl,
        "blend": weight * kl + (1 - weight) * tv,
        "length": 0.9 * rejected + 0.1 * kl,
    }[loss]
    torch.testing.assert_close(sums.loss, expected.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.nll_K, torch.cat([torch.zeros(1), kl.sum(0)]), rtol=1e-4, atol=1e-4)
    assert sums.windows == 8


@pytest.mark.parametrize("loss", TEXT_LOSSES)
def test_a_loss_on_sampled_tokens_estimates_the_loss_on_all(loss, monkeypatch):
    monkeypatch.setattr("kforcing.distillation.text.LIKELIEST", 3)
    model, b = make_sequential(make_backbone(scale=3.0), K, hint_layers=1), batch()
    whole = TextStep(model, loss)(b).loss
    batches = [dataclasses.replace(b, noise_BWK=batch(seed).noise_BWK) for seed in range(20)]
    estimates = torch.stack([TextStep(model, loss, sampled=200)(x).loss for x in batches])
    assert TextStep(model, loss, sampled=200)(b).loss == TextStep(model, loss, sampled=200)(b).loss
    torch.testing.assert_close(estimates.mean(), whole, rtol=0.1, atol=0.0)


def test_gradients_reach_the_readout_and_not_the_trunk():
    model = make_sequential(make_backbone(), K, hint_layers=1)
    TextStep(model)(batch()).loss.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.readout.correct.parameters())
    assert all(p.grad is not None for p in model.readout.layers.parameters() if p.requires_grad)


def test_a_student_that_equals_the_ar_model_agrees_with_every_draw(monkeypatch):
    model = make_sequential(make_backbone(), K, hint_layers=1)
    b = batch()
    from kforcing.attention.windows import read_context
    from kforcing.readout.base import BlockScores

    places = b.anchors_BW[..., None] + torch.arange(K)
    states = read_context(model.backbone, b.tokens_BN).at(places.flatten(1)).unflatten(1, (-1, K))
    head = model.backbone.get_output_embeddings()
    monkeypatch.setattr(model, "scores", lambda *_: BlockScores(states, head))
    sums = TextStep(model)(b)
    assert sums.match_K.tolist() == [8.0] * K
    assert sums.block == 8
    assert sums.loss.abs() < 1e-4


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(0)
    student = PushForwardLM.from_backbone(
        make_backbone(), K, Design("sequential", "gumbel", sequential=SequentialConfig(hint_layers=1))
    )
    step, b = TextStep(student), batch()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        sums = step(b)
        sums.loss.backward()
        optimizer.step()
        losses.append(sums.loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (lambda: PushForwardLM.from_backbone(make_backbone(), 4), "kl", "readout=argmax"),
        (lambda: make_sequential(make_backbone(), 4, freeze_trunk=False), "kl", "frozen trunk"),
        (lambda: make_sequential(make_backbone(), 1), "kl", "k=1"),
        (lambda: make_sequential(make_backbone(), 4), "ce", "loss=ce: choose one of kl, tv, blend, length"),
    ],
)
def test_unfit_students_and_unknown_losses_are_refused(model, loss, message):
    with pytest.raises(ValueError, match=message):
        TextStep(model(), loss)
