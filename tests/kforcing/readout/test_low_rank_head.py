"""The low-rank head that chooses candidates: the best map of its rank, and decoding with it."""

import pytest
import torch

from kforcing import Design, PushForwardLM, SequentialConfig
from kforcing.attention.windows import Windows
from kforcing.coupling import gumbel_candidates, gumbel_max
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.readout.low_rank_head import LowRankHead
from tests.models import VOCAB, make_backbone, make_sequential

V, D, S = 40, 12, 400


def states_and_head(seed=0):
    """States with a mean, most of whose variance lies in a few directions."""
    g = torch.Generator().manual_seed(seed)
    scales = 3.0 ** -torch.arange(D, dtype=torch.float32)
    mixing = torch.linalg.qr(torch.randn(D, D, generator=g)).Q
    states = torch.randn(S, D, generator=g) * scales @ mixing + torch.randn(D, generator=g)
    return states, torch.randn(V, D, generator=g) + torch.randn(D, generator=g)


def test_full_rank_gives_the_logits_up_to_a_constant():
    states, weight = states_and_head()
    head = LowRankHead(D, V, D)
    head.fit(weight, states)
    error = head(states) - states @ weight.T
    assert (error - error.mean(dim=-1, keepdim=True)).abs().max() < 1e-2


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_low_rank_logits_have_the_least_squared_error(rank):
    states, weight = states_and_head()
    head = LowRankHead(D, V, rank)
    head.fit(weight, states)
    logits = states @ (weight - weight.mean(dim=0)).T
    spread = logits - logits.mean(dim=0)
    least = torch.linalg.svdvals(spread.double())[rank:].square().sum()
    error = (head(states) - logits).double().square().sum()
    torch.testing.assert_close(error, least, rtol=1e-2, atol=1e-3)


def test_candidates_hold_the_winner_and_are_chosen_with_its_noise():
    g = torch.Generator().manual_seed(0)
    logits, z = 2 * torch.randn(300, V, generator=g), torch.rand(300, generator=g, dtype=torch.float64)
    winner = gumbel_max(logits, z, 0.7)
    ids = gumbel_candidates(logits, z, 0.7, 1).ids
    assert torch.equal(ids[:, 0], winner)
    likeliest = logits.topk(5, dim=-1).indices
    assert not (likeliest == winner[:, None]).any(dim=-1).all()
    assert (gumbel_candidates(logits, z, 0.7, 5).ids == winner[:, None]).any(dim=-1).all()


def test_a_draw_among_candidates_is_the_draw_where_other_tokens_have_no_probability():
    g = torch.Generator().manual_seed(1)
    rough, z = 2 * torch.randn(300, V, generator=g), torch.rand(300, generator=g, dtype=torch.float64)
    temperature = torch.linspace(0.1, 2, 300, dtype=torch.float64)
    candidates = gumbel_candidates(rough, z, temperature, 5)
    logits = (rough + torch.randn(300, V, generator=g)).gather(-1, candidates.ids)
    whole = torch.full((300, V), -torch.inf).scatter(-1, candidates.ids, logits)
    assert torch.equal(candidates.draw(logits, temperature), gumbel_max(whole, z, temperature))


def student(rank, shortlist):
    model = make_sequential(make_backbone(), 4, hint_layers=1, draft_rank=rank, shortlist=shortlist)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (8, 40), generator=g)
    anchors = torch.arange(30).expand(8, -1)
    windows = Windows(tokens, anchors, torch.rand(8, 30, 4, dtype=torch.float64, generator=g), torch.ones(8))
    blocks = tokens.gather(1, (anchors[..., None] + 1 + torch.arange(4)).flatten(1)).view(8, 30, 4)
    model.readout.fit_candidates(model.backbone, windows, blocks)
    return model


def test_with_full_rank_and_all_tokens_nothing_changes():
    short = student(16, VOCAB)
    whole = make_sequential(make_backbone(), 4, hint_layers=1)
    whole.readout.load_state_dict(
        {name: x for name, x in short.readout.state_dict().items() if not name.startswith("candidates")}
    )
    prompt = torch.arange(9)[None]
    outputs = [model.continue_prompts(prompt, max_new_tokens=24, seed=3)[0] for model in (short, whole)]
    assert outputs[0] == outputs[1]


def test_drafts_from_candidates_leave_the_text_of_exact_mode_alone():
    model = student(3, 4)
    requests = [Request(list(range(1 + i, 8 + i)), 24, i) for i in range(4)]
    config = EngineConfig(max_num_seqs=4, max_model_len=60, coupling="gumbel")
    ar = Engine(model.backbone, config).generate(requests)
    exact = Engine(model, EngineConfig(max_num_seqs=4, max_model_len=60, acceptance="exact")).generate(requests)
    assert [c.tokens for c in exact] == [c.tokens for c in ar]


def test_a_saved_student_keeps_its_low_rank_head(tmp_path):
    model = student(3, 4)
    model.save_pretrained(tmp_path)
    loaded = PushForwardLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.readout.candidates.up.weight, model.readout.candidates.up.weight)
    assert not any(p.requires_grad for p in model.readout.candidates.parameters())


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Design("sequential", "gumbel", sequential=SequentialConfig(draft_rank=3)), "shortlist=0: set a shortlist"),
        (
            Design("sequential", "inverse_cdf", sequential=SequentialConfig(draft_rank=3, shortlist=4)),
            "use coupling=gumbel",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(design, message):
    with pytest.raises(ValueError, match=message):
        design.check()
