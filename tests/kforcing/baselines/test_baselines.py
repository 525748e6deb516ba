import pytest
import torch
from scipy.stats import kstest
from torch import nn

from kforcing import Design, NoiseConfig, PushForwardLM, SequentialConfig
from kforcing.baselines.assisted import AssistedDecoder, draft_model
from kforcing.baselines.base import Rows, TextWindows, verify
from kforcing.baselines.inversion import InversionStep, invert, with_heads
from kforcing.baselines.mdlm import MaskedDecoder, MaskedLM, MaskedStep, unmasking_law
from kforcing.baselines.medusa import MedusaDecoder, MedusaHeads, MedusaStep
from kforcing.baselines.ptp import PTPDecoder
from kforcing.coupling import COUPLINGS, inverse_cdf
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.keys import derive_key
from kforcing.noise import sample_anchors, uniform
from kforcing.reference import decode
from tests.models import CONFIGS, VOCAB, make_backbone

PROMPTS = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
SEEDS = [3, 4, 5]


def paper_student(k=4):
    return PushForwardLM.from_backbone(make_backbone(seed=7), k, Design(noise=NoiseConfig(0.25, 32.0))).eval()


def text_windows(k=3, n=20, rows=4, windows=5):
    tokens = torch.randint(0, VOCAB, (rows, n), generator=torch.Generator().manual_seed(1))
    seq = torch.arange(rows)
    anchors = sample_anchors(derive_key(0), seq, n - k, windows)
    noise = uniform(derive_key(1), seq[:, None, None], anchors[..., None], torch.arange(k))
    return TextWindows(tokens, anchors, noise)


def ar_tokens(coupling, new_tokens, name="llama"):
    engine = Engine(make_backbone(name), EngineConfig(max_num_seqs=3, max_model_len=40, coupling=coupling))
    requests = [Request(p, new_tokens, seed) for p, seed in zip(PROMPTS.tolist(), SEEDS, strict=True)]
    return torch.tensor([c.tokens for c in engine.generate(requests)])


def test_following_tokens_are_those_after_the_anchor():
    batch = text_windows()
    anchor = batch.anchors_BW[2, 3]
    assert torch.equal(batch.following_BWK[2, 3], batch.tokens_BN[2, anchor + 1 : anchor + 4])


def test_inverted_noise_maps_to_the_token_and_is_uniform():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 11, generator=g).mul_(3)
    tokens = logits.softmax(-1).multinomial(1, generator=g)[:, 0]
    z = invert(logits, tokens, torch.rand(4000, generator=g, dtype=torch.float64))
    assert torch.equal(inverse_cdf(logits, z), tokens)
    assert kstest(z.numpy(), "uniform").pvalue > 0.01


def test_drafts_hold_up_to_the_first_wrong_one():
    drafts = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    assert verify(drafts, torch.tensor([[1, 2, 3, 4]] * 3)).tolist() == [4, 2, 1]
    assert verify(drafts, torch.tensor([[1, 2, 3]] * 3)).tolist() == [3, 2, 1]


def test_rows_grow_at_their_own_pace():
    rows = Rows(PROMPTS, SEEDS, 4, spare=2)
    rows.append(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([2, 1, 2]))
    rows.append(torch.tensor([[7, 8], [9, 10], [11, 12]]), torch.tensor([1, 2, 1]))
    assert rows.length_R.tolist() == [12, 12, 12]
    assert rows.tokens_RC[:, 9:12].tolist() == [[1, 2, 7], [3, 9, 10], [5, 6, 11]]
    rows.append(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([2, 1, 2]))
    assert rows.length_R.tolist() == [13, 13, 13]  # not beyond what was asked for


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("coupling", list(COUPLINGS))
def test_medusa_writes_what_the_ar_model_writes(coupling, name):
    backbone = make_backbone(name)
    heads = MedusaHeads(backbone, 4)
    for part in heads.heads:
        nn.init.normal_(part.weight, std=0.3)
    decoder = MedusaDecoder(backbone, heads, COUPLINGS[coupling])
    done = decoder.decode(PROMPTS, 14, SEEDS)
    assert torch.equal(done.tokens_RT, ar_tokens(coupling, 14, name))
    again = decoder.decode(PROMPTS.flip(0), 14, SEEDS[::-1])  # in the cache of the first
    assert torch.equal(again.tokens_RT, done.tokens_RT.flip(0))
    assert 1 / 5 <= done.passes <= 1


def test_ptp_writes_what_the_ar_model_writes():
    done = PTPDecoder(paper_student(), make_backbone()).decode(PROMPTS, 14, SEEDS)
    assert torch.equal(done.tokens_RT, ar_tokens("inverse_cdf", 14))
    assert 2 / 5 <= done.passes <= 2


def test_ptp_with_a_draft_that_is_the_teacher_accepts_everything():
    same = Design("sequential", "inverse_cdf", sequential=SequentialConfig(hints="none", draft="none"))
    student = PushForwardLM.from_backbone(make_backbone(), 1, same).eval()
    done = PTPDecoder(student, make_backbone()).decode(PROMPTS, 12, SEEDS)
    assert torch.equal(done.tokens_RT, ar_tokens("inverse_cdf", 12))
    assert done.passes == 1  # two passes for a draft of one token and the one that follows it


def test_heads_decode_in_the_engine_as_in_the_plain_loop():
    student = with_heads(paper_student())
    for part in student.readout.heads:
        nn.init.normal_(part.weight, std=0.5)
    requests = [Request(p, 12, seed) for p, seed in zip(PROMPTS.tolist(), SEEDS, strict=True)]
    made = [c.tokens for c in Engine(student, EngineConfig(max_num_seqs=3, max_model_len=24)).generate(requests)]
    for row, tokens, seed in zip(PROMPTS, made, SEEDS, strict=True):
        assert tokens == decode(student, row.tolist(), 12, seed=seed, k=4)
    with pytest.raises(ValueError, match="exactly 4 noises"):
        student(PROMPTS, torch.rand(3, 2))


def test_inversion_learns_the_map_on_which_it_is_trained():
    teacher, student = make_backbone(), paper_student(3)
    for model in (student, with_heads(paper_student(3))):
        step = InversionStep(model, teacher)
        optimizer = torch.optim.Adam([p for p in step.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(12):
            sums = step(text_windows())
            losses.append(sums.loss.item() / sums.tokens)
            optimizer.zero_grad()
            sums.loss.backward()
            optimizer.step()
        assert sums.tokens == 4 * 5 * 3
        assert losses[-1] < 0.7 * losses[0]
        assert not any(p.requires_grad for p in teacher.parameters())


def test_medusa_heads_learn_the_tokens_after_the_next():
    backbone = make_backbone()
    step = MedusaStep(backbone, MedusaHeads(backbone, 3))
    tokens = torch.arange(20).repeat(4, 1) % 3
    batch = TextWindows(tokens, torch.arange(12).repeat(4, 1), torch.rand(4, 12, 4))
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        sums = step(batch)
        losses.append(sums.loss.item() / sums.tokens)
        optimizer.zero_grad()
        sums.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert sums.tokens == 4 * 12 * 3


def test_masked_model_reads_both_ways_and_not_what_is_masked():
    model = MaskedLM(make_backbone())
    tokens = PROMPTS.clone()
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, 4] = True
    every = torch.arange(1, 9).repeat(3, 1)
    before = model(tokens, masked, every)
    tokens[:, 4] += 1
    assert torch.equal(model(tokens % VOCAB, masked, every), before)
    tokens[:, 8] = (tokens[:, 8] + 1) % VOCAB
    assert (model(tokens % VOCAB, masked, every) - before)[:, 3].abs().max() > 1e-4


def test_masked_loss_is_the_weighted_nll_of_masked_tokens():
    model = MaskedLM(make_backbone())
    tokens = torch.randint(0, VOCAB, (4, 10), generator=torch.Generator().manual_seed(4))
    u = torch.rand(4, 10, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sums = MaskedStep(model)(TextWindows(tokens, torch.arange(10).repeat(4, 1), u))
    total = 0.0
    for b in range(4):
        rate = (b + u[0, 0, 0].item()) / 4
        masked = u[b, :, 0] < rate
        masked[0] = False
        logp = model(tokens[b : b + 1], masked[None], torch.arange(1, 10)[None])[0].log_softmax(-1)
        total -= sum(logp[i - 1, tokens[b, i]].item() / rate for i in range(1, 10) if masked[i])
    assert sums.loss.item() == pytest.approx(total, rel=1e-4)
    assert sums.tokens == 36


def test_masked_decoding_fills_every_position_and_counts_its_passes():
    done = MaskedDecoder(MaskedLM(make_backbone()), 4).decode(PROMPTS, 10, SEEDS)
    assert done.tokens_RT.shape == (3, 10)
    assert done.passes == 0.3
    assert len(done.tokens_RT.unique()) > 3
    again = MaskedDecoder(MaskedLM(make_backbone()), 4).decode(PROMPTS[1:2], 10, SEEDS[1:2])
    assert torch.equal(again.tokens_RT[0], done.tokens_RT[1])


def test_theorem_1_one_position_a_pass_is_lossless_and_two_are_not():
    g = torch.Generator().manual_seed(0)
    joint = torch.rand(3, 3, 3, generator=g, dtype=torch.float64)
    joint /= joint.sum()
    torch.testing.assert_close(unmasking_law(joint, 1), joint)
    for k in (2, 3):
        law = unmasking_law(joint, k)
        assert law.sum().item() == pytest.approx(1)
        assert (law - joint).abs().sum() / 2 > 0.02
    one, two, three = (torch.rand(3, generator=g, dtype=torch.float64).softmax(0) for _ in range(3))
    product = one[:, None, None] * two[:, None] * three
    torch.testing.assert_close(unmasking_law(product, 3), product)
    # Two tokens that are always equal: independent draws agree half of the time.
    same = torch.eye(2, dtype=torch.float64) / 2
    assert (unmasking_law(same, 2) - same).abs().sum().item() / 2 == 0.5


def test_a_masked_sampler_with_perfect_marginals_follows_the_computed_law():
    """The decoder itself, on a model whose marginals are exact for two equal tokens after any prompt."""

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(()))  # where the model is

        def forward(self, tokens_BN, masked_BN, at_BK):
            logits = torch.zeros(*tokens_BN.shape, 2)
            for here, other in ((-2, -1), (-1, -2)):
                known = ~masked_BN[:, other]
                value = nn.functional.one_hot(tokens_BN[:, other].clamp(max=1), 2) * 200.0 - 100
                logits[:, here] = torch.where(known[:, None], value, 0.0)
            return logits.gather(1, at_BK[..., None].expand(-1, -1, 2))

    prompts = torch.zeros(4000, 2, dtype=torch.int64)
    for k, expected in ((1, 1.0), (2, 0.5)):
        done = MaskedDecoder(Twins(), k).decode(prompts, 2, list(range(4000)))
        agree = (done.tokens_RT[:, 0] == done.tokens_RT[:, 1]).double().mean().item()
        assert agree == pytest.approx(expected, abs=0.03)


def test_assisted_generation_writes_as_many_tokens_and_counts_passes_of_both_models():
    backbone = make_backbone()
    draft = draft_model(backbone)
    assert draft.config.num_hidden_layers == 1
    assert torch.equal(draft.get_input_embeddings().weight, backbone.get_input_embeddings().weight)
    plain = AssistedDecoder(make_backbone(), None).decode(PROMPTS, 8, SEEDS)
    assert plain.tokens_RT.shape == (3, 8)
    assert plain.passes == 1
    done = AssistedDecoder(backbone, draft).decode(PROMPTS, 8, SEEDS)
    assert done.tokens_RT.shape == (3, 8)
    assert done.passes > 1


def test_what_a_model_would_rather_sample_with_does_not_reach_the_table():
    cold = make_backbone()
    cold.generation_config.do_sample = True
    cold.generation_config.temperature, cold.generation_config.top_p = 0.01, 0.1
    plain = AssistedDecoder(make_backbone(), None).decode(PROMPTS, 8, SEEDS)
    assert torch.equal(AssistedDecoder(cold, None).decode(PROMPTS, 8, SEEDS).tokens_RT, plain.tokens_RT)
