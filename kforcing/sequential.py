"""The sequential read-out: an exact AR trunk, parallel hints for depth, a small head for dependence.

    trunk     the AR model; reads context and committed tokens only; its own head gives token 1, exactly
    hints     K−1 learned queries at positions t+1 … t+K−1, through layers that see the trunk's keys and values and the
              earlier hints of their window: what can be known of the block before its tokens are
    head      one transformer block over [trunk state, then for each token made (trunk state, hint state, embedding)]:
              it corrects the hint's logits for the tokens before, K−1 times

A coupling draws each token from its distribution outside the network, so temperature and log-probabilities mean what
they say. The step is still a push-forward map: k noise variables in, k tokens out.

Shapes: B batch, W windows, K tokens of a block, H = K − 1 hints, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import AutoModel, PreTrainedModel

from kforcing.coupling import Coupling
from kforcing.losses import CHUNK
from kforcing.readout import BlockScores, Pick, Readout, Turn, open_windows
from kforcing.recompute import in_chunks
from kforcing.staircase import Context, Reader, Windows, embeddings, head, lm_head


@dataclass(frozen=True)
class SequentialConfig:
    """Parts and sizes of the sequential read-out."""

    hints: str = "copy"
    """Layers that hints go through: `none` (no hints), `copy` (copies of the trunk's last layers, trained) or `adapter`
    (the trunk's own last layers, with trained low-rank additions and norms of their own that only hints see)."""
    hint_layers: int = 0
    """How many of the last layers; 0 for all."""
    adapter_rank: int = 16
    """Rank of the additions of `adapter`."""
    draft: str = "first"
    """What hint j sees of token j: `first` (hint 1 carries the token the trunk has just made), `none`, or `bigram`
    (later hints carry a guess by a bigram model under the same noise, too)."""
    shortlist: int = 0
    """Score hint states against the vocabulary in parallel and let the head re-score only this many best tokens of
    each; 0 scores the whole vocabulary after each token."""
    side_weight: float = 0.3
    """Weight of the loss on logits that only choose candidates (of hints for a shortlist, of the bigram draft)."""
    freeze_trunk: bool = True
    """Leave the AR model as it is, so that it stays in the checkpoint and token 1 stays exact."""

    def check(self) -> None:
        """Raise ValueError for an unknown choice or a size that cannot be."""
        if self.hints not in ("none", "copy", "adapter"):
            raise ValueError(f"hints={self.hints}: choose one of none, copy, adapter")
        if self.draft not in ("none", "first", "bigram"):
            raise ValueError(f"draft={self.draft}: choose one of none, first, bigram")
        if min(self.hint_layers, self.shortlist, self.side_weight) < 0 or self.adapter_rank < 1:
            raise ValueError(
                f"hint_layers={self.hint_layers}, shortlist={self.shortlist} and side_weight={self.side_weight} must be at "
                f"least 0, adapter_rank={self.adapter_rank} at least 1"
            )
        if self.hints == "none" and (self.draft != "none" or self.shortlist):
            raise ValueError(
                f"hints=none has nothing to show draft={self.draft} to or to choose a shortlist of {self.shortlist} from; "
                "set draft=none and shortlist=0, or hints=copy"
            )


class LowRank(nn.Module):
    """A linear map of the trunk plus a low-rank one of its own: base(x) + up(down(x)), the latter zero at first (LoRA)."""

    def __init__(self, base: Any, rank: int):
        super().__init__()
        self._base = (base,)  # in a tuple: the trunk owns it
        transposed = type(base).__name__ == "Conv1D"  # GPT-2 keeps weights as (in, out)
        fan_in, fan_out = base.weight.shape if transposed else base.weight.shape[::-1]
        self.down = nn.Linear(fan_in, rank, bias=False)
        self.up = nn.Linear(rank, fan_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return self._base[0](x) + self.up(self.down(x))


def hint_stack(trunk: Any, config: SequentialConfig) -> PreTrainedModel:
    """The last layers of a base model as a model of their own: copies, or low-rank additions around the originals."""
    total = trunk.config.num_hidden_layers
    layers = config.hint_layers or total
    if layers > total:
        raise ValueError(f"hint_layers={layers}: the backbone has {total} layers; choose 1 to {total}, or 0 for all")
    shallow = copy.deepcopy(trunk.config)
    shallow.num_hidden_layers, shallow.vocab_size, shallow.pad_token_id = layers, 1, None
    for name, value in vars(trunk.config).items():
        if isinstance(value, list) and len(value) == total:  # a setting for each layer, like layer_types
            setattr(shallow, name, value[-layers:])
    stack = AutoModel.from_config(shallow, attn_implementation="sdpa")
    stack.set_input_embeddings(nn.Identity())  # hints come as embeddings

    def original(name: str) -> str:
        """The trunk's name for a part of the stack: layer i of the stack is layer total − layers + i."""
        return re.sub(r"(?<=\.)\d+(?=\.)", lambda m: str(int(m[0]) + total - layers), name, count=1)

    source = trunk.state_dict()
    missing = [name for name in stack.state_dict() if original(name) not in source]
    if missing:
        raise ValueError(
            f"hint_layers={layers}: the last layers of {type(trunk).__name__} are built differently when they stand alone "
            f"(no {original(missing[0])}); use hint_layers=0, or hints=none with draft=none"
        )
    stack.load_state_dict({name: source[original(name)] for name in stack.state_dict()})
    if config.hints == "adapter":
        for name, module in list(stack.named_modules()):
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                parent, _, leaf = name.rpartition(".")
                setattr(
                    stack.get_submodule(parent), leaf, LowRank(trunk.get_submodule(original(name)), config.adapter_rank)
                )
    return stack


Past = tuple[Tensor, Tensor]


class HeadBlock(nn.Module):
    """One causal pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def _qkv(self, x_TLD: Tensor) -> Tensor:
        T, L, _ = x_TLD.shape
        return self.qkv(self.attention_norm(x_TLD)).view(T, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

    def remember(self, x_TLD: Tensor) -> Past:
        """Keys and values of entries whose outputs nobody needs."""
        _, k, v = self._qkv(x_TLD)
        return k, v

    def forward(self, x_TLD: Tensor, past: Past) -> tuple[Tensor, Past]:
        """(T, L, D) new entries after those in `past` → their (T, L, D) outputs, and keys and values of all."""
        T, L, _ = x_TLD.shape
        q, k, v = self._qkv(x_TLD)
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = torch.ones(L, k.shape[2], dtype=torch.bool, device=k.device).tril(k.shape[2] - L)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_TLD = x_TLD + self.out(mixed.transpose(1, 2).reshape(T, L, -1))
        return x_TLD + self.down(gelu(self.up(self.mlp_norm(x_TLD)))), (k, v)


class SequentialReadout(Readout):
    """See the module's text."""

    def __init__(self, backbone: PreTrainedModel, k: int, config: SequentialConfig, coupling: Coupling):
        super().__init__()
        self.config, self.coupling = config, coupling
        width = embeddings(backbone).weight.shape[1]
        if head(backbone).weight.shape[1] != width:
            raise ValueError(
                f"{type(backbone).__name__} has embeddings and a head of different widths; they must agree"
            )
        if config.hints != "none":
            self.layers = hint_stack(backbone.base_model, config)
            self.queries = nn.Embedding(max(k - 1, 1), width)
            nn.init.normal_(self.queries.weight, std=embeddings(backbone).weight.std().item())
        if config.draft == "bigram":
            self.bigram = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.token_norm = nn.LayerNorm(width)
        self.entry = nn.Linear(3 * width, width)
        self.positions = nn.Embedding(k, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.block = HeadBlock(width, math.gcd(width, backbone.config.num_attention_heads))
        self.norm = nn.LayerNorm(width)
        self.correct = nn.Linear(width, width)

    def start(self, backbone: PreTrainedModel) -> None:
        """Begin as the parallel hints alone: the head corrects nothing yet."""
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)

    def grow(self, k: int) -> None:
        """New hints and places in the block begin as the last known ones."""
        self.positions = _extended(self.positions, k)
        if self.config.hints != "none":
            self.queries = _extended(self.queries, max(k - 1, 1))

    def pick(self, logits: Tensor, z: Tensor, temperature: Tensor | float) -> Tensor:
        """The coupled draw."""
        return self.coupling(logits.float(), z, temperature)

    def scores(
        self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor, context: Context | None = None
    ) -> BlockScores:
        """p(· | context, tokens before) over the whole vocabulary, for every token of the given blocks."""
        context, reader = open_windows(backbone, windows, context)
        trunk_BWD = self._trunk(backbone, windows, reader, context.at(windows.anchors_BW))
        first_BW1D = trunk_BWD[:, :, None]
        if windows.k == 1:
            return BlockScores(first_BW1D, head(backbone))
        drafts, side = self._drafts(backbone, windows, tokens_BWK)
        hints_BWHD = self._hints(backbone, trunk_BWD, reader, drafts, windows.k)
        before_BWHD = embeddings(backbone)(tokens_BWK[..., :-1])
        corrections_BWHD, _ = self._head(trunk_BWD, hints_BWHD, before_BWHD, 1, self._first_entry(trunk_BWD))
        side = (*side, hints_BWHD) if self.config.shortlist else side
        return BlockScores(torch.cat([first_BW1D, hints_BWHD + corrections_BWHD], dim=2), head(backbone), side)

    def turns(
        self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None, pick: Pick
    ) -> Iterator[Turn]:
        """Token 1 from the trunk, then K−1 turns of the head."""
        trunk_BWD = self._trunk(backbone, windows, reader, known_BWD)
        hints_BWHD = parallel_BWHV = None
        if windows.k > 1 and self.config.shortlist and self.config.draft == "none":
            # Nothing waits for token 1: one pass of the LM head scores it and all hints.
            hints_BWHD = self._hints(backbone, trunk_BWD, reader, [], windows.k)
            logits_BWKV = lm_head(backbone, torch.cat([trunk_BWD[:, :, None], hints_BWHD], dim=2))
            logits_BWV, parallel_BWHV = logits_BWKV[:, :, 0], logits_BWKV[:, :, 1:]
        else:
            logits_BWV = lm_head(backbone, trunk_BWD)
        token_BW = pick(logits_BWV, 0)
        yield logits_BWV, token_BW
        if windows.k == 1:
            return
        if hints_BWHD is None:
            drafts, _ = self._drafts(backbone, windows, token_BW[..., None])
            hints_BWHD = self._hints(backbone, trunk_BWD, reader, drafts, windows.k)
        yield from self._later_turns(backbone, trunk_BWD, hints_BWHD, parallel_BWHV, token_BW, pick)

    def tokens(self, backbone: PreTrainedModel, windows: Windows, context: Context | None = None) -> Tensor:
        """See `Readout.tokens`: the head takes its turns on some windows after the other."""
        context, reader = open_windows(backbone, windows, context)
        trunk_BWD = self._trunk(backbone, windows, reader, context.at(windows.anchors_BW))
        trunk_RD, noise_RK = trunk_BWD.flatten(0, 1), windows.noise_BWK.flatten(0, 1)
        temperature_R, shape = windows.temperature_BW.flatten(), windows.noise_BWK.shape
        guess = partial(self._guess, backbone, trunk_RD, noise_RK[:, 0], temperature_R)
        (first_R,) = in_chunks(guess, len(trunk_RD), CHUNK)
        if windows.k == 1:
            return first_R.view(shape)
        drafts, _ = self._drafts(backbone, windows, first_R.view(shape[:2])[..., None])
        hints_RHD = self._hints(backbone, trunk_BWD, reader, drafts, windows.k).flatten(0, 1)

        def later(rows: slice) -> tuple[Tensor, ...]:
            def pick(logits_1RV: Tensor, offset: int) -> Tensor:
                return self.pick(logits_1RV, noise_RK[None, rows, offset], temperature_R[None, rows])

            hints = hints_RHD[None, rows]
            turns = self._later_turns(backbone, trunk_RD[None, rows], hints, None, first_R[None, rows], pick)
            return (torch.cat([token for _, token in turns]).T,)

        (later_RH,) = in_chunks(later, len(trunk_RD), max(1, CHUNK // windows.k))
        return torch.cat([first_R[:, None], later_RH], dim=1).view(shape)

    def _later_turns(
        self,
        backbone: PreTrainedModel,
        trunk_BWD: Tensor,
        hints_BWHD: Tensor,
        parallel_BWHV: Tensor | None,
        token_BW: Tensor,
        pick: Pick,
    ) -> Iterator[Turn]:
        """The turns of the head, after token 1; `parallel_BWHV` are the hints' own logits, when they are made already."""
        if parallel_BWHV is None and self.config.shortlist:
            parallel_BWHV = lm_head(backbone, hints_BWHD)
        past = self._first_entry(trunk_BWD)
        for j in range(hints_BWHD.shape[2]):
            hint_BW1D = hints_BWHD[:, :, j : j + 1]
            before_BW1D = embeddings(backbone)(token_BW)[:, :, None]
            correction_BW1D, past = self._head(trunk_BWD, hint_BW1D, before_BW1D, j + 1, past)
            if parallel_BWHV is None:
                logits_BWV = lm_head(backbone, hint_BW1D + correction_BW1D)[:, :, 0]
            else:
                logits_BWV = self._shortlisted(backbone, parallel_BWHV[:, :, j], correction_BW1D[:, :, 0])
            token_BW = pick(logits_BWV, j + 1)
            yield logits_BWV, token_BW

    def _trunk(self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None) -> Tensor:
        """The trunk's state at the last known token of each window."""
        if windows.prefix_BWP is None:
            assert known_BWD is not None
            return known_BWD
        return reader.read(embeddings(backbone)(windows.prefix_BWP))[:, :, -1]

    def _drafts(
        self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Guesses (B, W) of tokens 1, 2, … for the hints to see, of which the first is known; bigram states to train."""
        if self.config.draft == "none":
            return [], ()
        drafts = [tokens_BWK[..., 0]]
        if self.config.draft == "first":
            return drafts, ()

        def bigram(tokens: Tensor) -> Tensor:
            return self.bigram(embeddings(backbone)(tokens))

        temperature_R, shape = windows.temperature_BW.flatten(), windows.anchors_BW.shape
        with torch.no_grad():
            for j in range(1, windows.k - 1):
                states_RD, noise_R = bigram(drafts[-1]).flatten(0, 1), windows.noise_BWK[..., j].flatten()
                guess = partial(self._guess, backbone, states_RD, noise_R, temperature_R)
                drafts.append(in_chunks(guess, shape.numel(), CHUNK)[0].view(shape))
        return drafts, (bigram(tokens_BWK[..., :-1]),) if torch.is_grad_enabled() else ()

    def _guess(
        self, backbone: PreTrainedModel, states_RD: Tensor, noise_R: Tensor, temperature_R: Tensor, rows: slice
    ) -> tuple[Tensor, ...]:
        return (self.pick(lm_head(backbone, states_RD[rows]), noise_R[rows], temperature_R[rows]),)

    def _hints(
        self, backbone: PreTrainedModel, trunk_BWD: Tensor, reader: Reader, drafts: list[Tensor], k: int
    ) -> Tensor:
        """States (B, W, H, D) that stand for the block before its tokens are known."""
        if self.config.hints == "none":
            return trunk_BWD[:, :, None].expand(-1, -1, k - 1, -1)
        numbers_H = torch.arange(k - 1, device=trunk_BWD.device)
        inputs = self.queries(numbers_H).expand(*trunk_BWD.shape[:2], -1, -1)
        if drafts:
            seen = embeddings(backbone)(torch.stack(drafts, dim=2))
            inputs = inputs + nn.functional.pad(seen, (0, 0, 0, k - 1 - len(drafts)))
        return reader.fork(self.layers, self.layers.config.num_hidden_layers).read(inputs)

    def _first_entry(self, trunk_BWD: Tensor) -> Past:
        """The head's memory of the trunk state alone."""
        nothing = torch.zeros_like(trunk_BWD[:, :, None])
        return self.block.remember(self._entries(trunk_BWD, nothing, nothing, 0))

    def _head(
        self, trunk_BWD: Tensor, hints_BWLD: Tensor, before_BWLD: Tensor, place: int, past: Past
    ) -> tuple[Tensor, Past]:
        """What the head adds to the hint states from `place` on, once the tokens before are known."""
        x_TLD, past = self.block(self._entries(trunk_BWD, hints_BWLD, self.token_norm(before_BWLD), place), past)
        return self.correct(self.norm(x_TLD)).view(hints_BWLD.shape), past

    def _entries(self, trunk_BWD: Tensor, hints_BWLD: Tensor, before_BWLD: Tensor, place: int) -> Tensor:
        """What the head reads at the places from `place` on: (B·W, L, D)."""
        L = hints_BWLD.shape[2]
        trunk_BWLD = trunk_BWD[:, :, None].expand(-1, -1, L, -1)
        x = self.entry(torch.cat([trunk_BWLD, hints_BWLD, before_BWLD], dim=-1))
        return (x + self.positions(torch.arange(place, place + L, device=x.device))).flatten(0, 1)

    def _shortlisted(self, backbone: PreTrainedModel, parallel: Tensor, corrections: Tensor) -> Tensor:
        """Parallel logits, corrected on the shortlist of their best tokens and −inf elsewhere: (..., V)."""
        best, ids = parallel.topk(min(self.config.shortlist, parallel.shape[-1]), dim=-1)
        rows = head(backbone).weight[ids]
        corrected = best + (rows @ corrections[..., None]).squeeze(-1)
        return torch.full_like(parallel, -torch.inf).scatter(-1, ids, corrected)


def _extended(table: nn.Embedding, n: int) -> nn.Embedding:
    """The first n rows, with the last repeated as often as rows are missing."""
    rows = table.weight.detach()
    rows = torch.cat([rows, rows[-1:].expand(max(0, n - len(rows)), -1)])[:n]
    return nn.Embedding.from_pretrained(rows.clone(), freeze=False)
