import torch

from kforcing.coupling import COUPLINGS, inverse_cdf
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.metrics.free_run import free_run, same_so_far
from tests.models import VOCAB, make_backbone, make_sequential

PROMPTS = torch.randint(0, VOCAB, (5, 6), generator=torch.Generator().manual_seed(0))
SEEDS = [10, 11, 12, 13, 14]


def run(model, coupling="inverse_cdf", **config):
    engine = Engine(model, EngineConfig(max_num_seqs=5, max_model_len=40, coupling=coupling, **config))
    requests = [Request(p, 20, seed) for p, seed in zip(PROMPTS.tolist(), SEEDS, strict=True)]
    return torch.tensor([c.tokens for c in engine.generate(requests)])


def test_the_ar_model_matches_itself_all_the_way():
    for name, coupling in COUPLINGS.items():
        made = run(make_backbone(), name)
        found = free_run(make_backbone(), PROMPTS, made, SEEDS, coupling, batch=2)
        assert found.match.all()
        assert torch.equal(found.decoder_nll, found.teacher_nll)


def test_each_position_is_judged_after_the_decoders_own_tokens():
    teacher = make_backbone()
    made = run(teacher)
    made[1, 4] = (made[1, 4] + 1) % VOCAB
    found = free_run(teacher, PROMPTS, made, SEEDS, inverse_cdf)
    assert found.match[:, :4].all()
    assert not found.match[1, 4]
    assert found.match[[0, 2, 3, 4]].all()
    with torch.no_grad():
        logp = teacher(input_ids=torch.cat([PROMPTS[1], made[1]])[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(
        found.decoder_nll[1], -logp[5:-1].gather(-1, made[1][:, None])[:, 0], rtol=1e-4, atol=1e-4
    )


def test_a_student_of_one_token_is_the_teacher_and_a_longer_block_strays():
    student = make_sequential(make_backbone())
    own = run(make_backbone(), "gumbel")
    assert torch.equal(run(student, k=1), own)
    made = run(student)
    same = same_so_far(made, own)
    found = free_run(make_backbone(), PROMPTS, made, SEEDS, COUPLINGS["gumbel"])
    assert same[:, 0].all()  # every block's first token is the AR model's
    assert found.match[:, ::4].all()
    assert found.match.float().mean() < 1
    assert (same <= found.match).all()


def test_same_so_far_ends_at_the_first_difference():
    assert same_so_far(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 4]])).tolist() == [
        [True, True, False, False]
    ]
