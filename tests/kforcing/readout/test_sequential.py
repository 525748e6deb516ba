"""The sequential read-out against the AR model it is built around."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from kforcing import Design, PushForwardLM, SequentialConfig
from kforcing.attention.reader import BlockReader, ar_block_logits
from kforcing.attention.windows import Windows, read_context
from kforcing.backbone import embeddings
from kforcing.coupling import COUPLINGS
from kforcing.distillation.losses import SoftTargets, soft_target_kl
from kforcing.distillation.steps import StudentStep, WindowBatch
from kforcing.distillation.teachers import ARTeacher, StudentTeacher
from kforcing.noise import uniform
from kforcing.reference import decode
from tests.models import VOCAB, make_backbone, make_sequential

PARTS = [
    {"hints": "none", "draft": "none"},
    {"hints": "copy", "draft": "none"},
    {"hints": "copy", "hint_layers": 1},
    {"hints": "adapter"},
    {"hints": "copy"},
    {"hints": "adapter", "hint_layers": 1, "draft": "bigram"},
]


def windows(B=2, N=9, W=3, K=4, seed=0, prefix=0):
    g = torch.Generator().manual_seed(seed)
    context = torch.randint(0, VOCAB, (B, N), generator=g)
    anchors = torch.stack([torch.randperm(N, generator=g)[:W] for _ in range(B)])
    noise = uniform(seed, torch.arange(B)[:, None, None], anchors[..., None], torch.arange(K))
    committed = torch.randint(0, VOCAB, (B, W, prefix), generator=g) if prefix else None
    return Windows(context, anchors, noise, torch.ones(B), committed)


class TeacherAsHead:
    """Replaces the head's distributions by the AR model's: reads each token through the whole trunk."""

    def __init__(self, student):
        self.student, self.readout = student, student.readout
        self.readout._hints, self.readout._head = self.hints, self.head
        self.readout._first_entry = lambda trunk: None

    def hints(self, backbone, trunk, reader, drafts, k):
        self.reader = reader.fork(backbone.base_model, backbone.config.num_hidden_layers)
        return torch.zeros(*trunk.shape[:2], k - 1, trunk.shape[2])

    def head(self, trunk, hints, before, place, past):
        return self.reader.read(before), None


@pytest.mark.parametrize("coupling", list(COUPLINGS))
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_student_with_the_teachers_distributions_decodes_as_the_ar_model(backbone, coupling, k):
    student = make_sequential(backbone, coupling=coupling)
    TeacherAsHead(student)
    prompts = windows(N=7).context_BN
    ar = [decode(backbone, row, 13, seed=4, coupling=COUPLINGS[coupling]) for row in prompts.tolist()]
    assert student.continue_prompts(prompts, k=k, max_new_tokens=13, seed=4) == ar


@pytest.mark.parametrize("coupling", list(COUPLINGS))
def test_a_student_of_one_token_a_step_is_the_teacher(backbone, coupling):
    student = make_sequential(backbone, coupling=coupling)
    prompts = windows(N=7).context_BN
    options = {"seed": 1, "temperature": 0.7}
    ar = [decode(backbone, row, 9, **options, coupling=COUPLINGS[coupling]) for row in prompts.tolist()]
    assert student.continue_prompts(prompts, k=1, max_new_tokens=9, seed=1, temperature=0.7) == ar


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_unrolled_and_teacher_forced_logits_agree(backbone, parts, prefix):
    student = make_sequential(backbone, **parts)
    w = windows(prefix=prefix)
    with torch.no_grad():
        drawn = student.draw(w)
        scores = student.scores(w, drawn.tokens_BWK)
    torch.testing.assert_close(scores.logits_BWKV, drawn.logits_BWKV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_windows_and_smaller_blocks_are_independent_of_their_neighbours(parts):
    student = make_sequential(make_backbone(), **parts)
    w = windows()
    with torch.no_grad():
        tokens = student.draw(w).tokens_BWK
        for b in range(2):
            for i in range(3):
                context = w.context_BN[b : b + 1, : w.anchors_BW[b, i] + 1]
                anchor = torch.full((1, 1), context.shape[1] - 1)
                for k in (2, 4):
                    one = Windows(context, anchor, w.noise_BWK[b : b + 1, i : i + 1, :k], torch.ones(1))
                    assert torch.equal(student.draw(one).tokens_BWK[0, 0], tokens[b, i, :k])


def test_committed_tokens_are_context():
    student = make_sequential(make_backbone())
    w = windows(W=1, prefix=3)
    for b in range(2):
        context = torch.cat([w.context_BN[b, : w.anchors_BW[b, 0] + 1], w.prefix_BWP[b, 0]])[None]
        plain = Windows(context, torch.full((1, 1), context.shape[1] - 1), w.noise_BWK[b : b + 1], torch.ones(1))
        with torch.no_grad():
            torch.testing.assert_close(
                student.draw(plain).logits_BWKV[0, 0], student.draw(w).logits_BWKV[b, 0], rtol=1e-4, atol=1e-4
            )
    with torch.no_grad():
        twice = StudentTeacher(student, k=2).rollout(windows(W=1))
    assert torch.equal(twice[..., :2], student.draw(windows(W=1, K=2)).tokens_BWK)


@pytest.mark.parametrize("hints", ["copy", "adapter"])
def test_new_hint_layers_compute_what_the_layers_of_the_trunk_do(backbone, hints):
    """A hint that carries token 1 and no query is the AR model's own state for token 2."""
    student = make_sequential(backbone, hints=hints, draft="first")
    torch.nn.init.zeros_(student.readout.queries.weight)
    student.readout.start(backbone)
    w = windows(K=2)
    with torch.no_grad():
        drawn = student.draw(w)
        exact = ar_block_logits(backbone, read_context(backbone, w.context_BN), w.anchors_BW, drawn.tokens_BWK)
    torch.testing.assert_close(drawn.logits_BWKV, exact, rtol=1e-4, atol=1e-4)


def test_the_last_layers_are_the_ones_copied():
    backbone = make_backbone()
    student = make_sequential(backbone, hint_layers=1)
    mine, theirs = student.readout.layers.layers[0].state_dict(), backbone.model.layers[1].state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="backbone has 2 layers"):
        make_sequential(backbone, hint_layers=3)


def test_training_touches_the_read_out_alone():
    for freeze in (True, False):
        backbone = make_backbone()
        student = make_sequential(backbone, freeze_trunk=freeze)
        w = windows()
        tokens, soft = ARTeacher(backbone, COUPLINGS["gumbel"]).labelled_rollout(w, 8)
        batch = WindowBatch(w, tokens, soft)
        StudentStep(student, "soft")(batch).loss.backward()
        assert all((p.grad is None) == freeze for p in backbone.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in student.readout.named_parameters())


def test_labels_from_the_model_inside_the_student_equal_those_of_the_rollout():
    backbone = make_backbone()
    student = make_sequential(backbone)
    w = windows()
    tokens, soft = ARTeacher(backbone, COUPLINGS["gumbel"]).labelled_rollout(w, VOCAB)
    shipped = StudentStep(student, "soft")(WindowBatch(w, tokens, soft)).loss
    local = StudentStep(student, "soft")(WindowBatch(w, tokens)).loss
    torch.testing.assert_close(local, shipped, rtol=1e-3, atol=1e-3)


def test_the_teachers_rollout_is_labelled_with_its_distributions():
    backbone = make_backbone()
    teacher = ARTeacher(backbone, COUPLINGS["inverse_cdf"])
    w = windows()
    tokens, soft = teacher.labelled_rollout(w, 5)
    assert torch.equal(tokens, teacher.rollout(w))
    with torch.no_grad():
        logits = ar_block_logits(backbone, read_context(backbone, w.context_BN), w.anchors_BW, tokens)
    best = logits.log_softmax(-1).topk(5, dim=-1)
    torch.testing.assert_close(soft.logp_BWKM, best.values, rtol=1e-4, atol=1e-4)
    assert soft.ids_BWKM.shape == (2, 3, 4, 5)


def test_on_policy_windows_are_scored_along_the_students_tokens():
    student = make_sequential(make_backbone())
    w = windows()
    targets = torch.zeros(2, 3, 4, dtype=torch.int64)
    step = StudentStep(student, "soft")
    with torch.no_grad():
        mixed = step(WindowBatch(w, targets, on_policy_B=torch.tensor([False, True])))
        drawn = student.draw(w).tokens_BWK
        parts = [
            step(WindowBatch(w.rows(torch.tensor([0])), targets[:1])),
            step(WindowBatch(w.rows(torch.tensor([1])), drawn[1:])),
        ]
    torch.testing.assert_close(mixed.loss, parts[0].loss + parts[1].loss, rtol=1e-4, atol=1e-4)


def test_on_policy_windows_do_not_count_as_matches():
    student = make_sequential(make_backbone())
    w = windows(W=8)
    wrong = (student.draw(w).tokens_BWK + 1) % VOCAB
    with torch.no_grad():
        sums = StudentStep(student, "soft")(WindowBatch(w, wrong, on_policy_B=torch.tensor([False, True])))
    assert sums.match_K[0] == 0
    assert sums.windows == 16


@pytest.mark.parametrize("parts", [None, {}, {"hints": "adapter"}], ids=str)
def test_a_saved_bf16_student_loads_with_the_same_weights(tmp_path, parts):
    backbone = make_backbone().bfloat16()
    student = make_sequential(backbone, **parts) if parts is not None else PushForwardLM.from_backbone(backbone, 4)
    student.save_pretrained(tmp_path)
    again = PushForwardLM.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    prompt = windows().context_BN
    assert again.continue_prompts(prompt, max_new_tokens=6) == student.eval().continue_prompts(prompt, max_new_tokens=6)


def test_backbones_whose_last_layers_differ_when_they_stand_alone_are_refused():
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
        decoder_sparse_step=2,
    )
    with pytest.raises(ValueError, match="built differently when they stand alone"):
        make_sequential(AutoModelForCausalLM.from_config(config), hint_layers=1)


def test_the_loss_is_the_divergence_from_the_teacher():
    backbone = make_backbone()
    student = make_sequential(backbone)
    w = windows()
    tokens = ARTeacher(backbone, COUPLINGS["gumbel"]).rollout(w)
    with torch.no_grad():
        exact = ar_block_logits(backbone, read_context(backbone, w.context_BN), w.anchors_BW, tokens)
        kl = soft_target_kl(student.scores(w, tokens).logits_BWKV, SoftTargets(exact.log_softmax(-1)))
        sums = StudentStep(student, "soft")(WindowBatch(w, tokens))
    assert kl[..., 0].abs().max() < 1e-5  # token 1 is exact
    torch.testing.assert_close(sums.loss, kl.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shortlist", [3, VOCAB])
def test_a_shortlist_draws_from_the_best_of_the_parallel_scores(shortlist):
    backbone = make_backbone()
    whole = make_sequential(backbone, coupling="inverse_cdf")
    short = make_sequential(backbone, coupling="inverse_cdf", shortlist=shortlist)
    short.load_state_dict(whole.state_dict())
    w = windows()
    with torch.no_grad():
        drawn, plain = short.draw(w), whole.draw(w)
        side = short.scores(w, drawn.tokens_BWK).side[-1]
    allowed = side.topk(shortlist, dim=-1).indices
    assert (allowed == drawn.tokens_BWK[:, :, 1:, None]).any(-1).all()
    assert (drawn.logits_BWKV[:, :, 1:].isfinite().sum(-1) == shortlist).all()
    if shortlist == VOCAB:
        assert torch.equal(drawn.tokens_BWK, plain.tokens_BWK)
        torch.testing.assert_close(drawn.logits_BWKV, plain.logits_BWKV, rtol=1e-4, atol=1e-4)


def test_side_logits_are_trained_with_their_weight():
    backbone = make_backbone()
    student = make_sequential(backbone, shortlist=3, draft="bigram", side_weight=0.5)
    w = windows()
    tokens = ARTeacher(backbone, COUPLINGS["gumbel"]).rollout(w)
    scores = student.scores(w, tokens)
    assert [tuple(s.shape) for s in scores.side] == [(2, 3, 3, VOCAB)] * 2
    sums = StudentStep(student, "hard")(WindowBatch(w, tokens))

    def nll(logits, targets):
        return -logits.log_softmax(-1).gather(-1, targets[..., None]).sum()

    expected = nll(scores.logits_BWKV, tokens) + 0.5 * sum(nll(side, tokens[..., 1:]) for side in scores.side)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_saving_loading_and_growing(tmp_path, parts, name):
    student = make_sequential(make_backbone(name), k=2, **parts)
    w = windows(K=2)
    with torch.no_grad():
        before = student.draw(w)
    student.save_pretrained(tmp_path)
    again = PushForwardLM.from_pretrained(tmp_path)
    assert again.config.design == student.config.design
    again.set_k(4)
    with torch.no_grad():
        assert torch.equal(again.draw(w).tokens_BWK, before.tokens_BWK)
        torch.testing.assert_close(
            again.draw(windows(K=4)).logits_BWKV[:, :, :2], before.logits_BWKV, rtol=1e-4, atol=1e-4
        )
    again.save_pretrained(tmp_path / "grown")
    assert PushForwardLM.from_pretrained(tmp_path / "grown").k == 4
    trunk = BlockReader(again.backbone.base_model, read_context(again.backbone, w.context_BN).layers, w.anchors_BW)
    assert trunk.read(embeddings(again.backbone)(before.tokens_BWK)).isfinite().all()


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (lambda: Design("sequentiel"), "readout=sequentiel: choose one of argmax, sequential"),
        (lambda: Design(coupling="gumble"), "coupling=gumble: choose one of"),
        (lambda: Design("argmax", "gumbel"), "undo a random generator"),
        (lambda: Design("sequential", sequential=SequentialConfig(hints="all")), "hints=all: choose one of"),
        (lambda: Design("sequential", sequential=SequentialConfig(draft="last")), "draft=last: choose one of"),
        (lambda: Design("sequential", sequential=SequentialConfig(adapter_rank=0)), "adapter_rank=0 at least 1"),
        (lambda: Design("sequential", sequential=SequentialConfig(hints="none")), "nothing to show draft=first"),
    ],
)
def test_impossible_designs_name_the_value(design, message):
    with pytest.raises(ValueError, match=message):
        PushForwardLM.from_backbone(make_backbone(), k=2, design=design())
