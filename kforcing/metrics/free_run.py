"""Fidelity far from the prompt, where the context of a decoder is its own text.

A decoder continues prompts under the noise of each row's seed. Then the AR model reads the decoder's text in one pass, which
tells for every position which token it would have made of the same noise after the *decoder's* tokens:

match         whether the decoder's token is the AR model's token
decoder_nll   −log p of the decoder's token under the AR model
teacher_nll   −log p of the AR model's own token at that position; the comparison of the two NLLs is two-sided
same          whether all tokens so far equal those of the AR model's own free run under the same noise
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.coupling import Coupling
from kforcing.keys import derive_key
from kforcing.noise import uniform


@dataclass(frozen=True)
class FreeRun:
    """Figures of each row and new token, all (R, T)."""

    match: Tensor
    decoder_nll: Tensor
    teacher_nll: Tensor


@torch.inference_mode()
def free_run(
    teacher: PreTrainedModel, prompts_RN: Tensor, made_RT: Tensor, seeds: list[int], coupling: Coupling, batch: int = 16
) -> FreeRun:
    """Compare continuations with the AR model under the noise of the rows' seeds.

    Args:
        teacher: the AR model.
        prompts_RN: int64.
        made_RT: int64, the decoder's tokens.
        seeds: of the rows, as given to the engine.
        coupling: with which the AR model turns noise into tokens.
        batch: rows of one forward pass.
    """
    N, T = prompts_RN.shape[1], made_RT.shape[1]
    keys = torch.tensor([derive_key(seed, "decode") for seed in seeds], device=made_RT.device)[:, None]
    noise_RT = uniform(keys, torch.zeros_like(keys), 0, torch.arange(N, N + T, device=made_RT.device))
    match, mine, own = [], [], []
    for rows in torch.arange(len(made_RT), device=made_RT.device).split(batch):
        whole = torch.cat([prompts_RN[rows], made_RT[rows]], dim=1)
        logp = teacher(input_ids=whole[:, :-1], use_cache=False).logits[:, N - 1 :].float().log_softmax(-1)
        theirs = coupling(logp, noise_RT[rows], 1.0)
        match.append(theirs == made_RT[rows])
        mine.append(-logp.gather(-1, made_RT[rows][..., None])[..., 0])
        own.append(-logp.gather(-1, theirs[..., None])[..., 0])
    return FreeRun(torch.cat(match), torch.cat(mine), torch.cat(own))


def same_so_far(made_RT: Tensor, reference_RT: Tensor) -> Tensor:
    """(R, T) bool: whether all tokens up to and including this one are equal."""
    return (made_RT == reference_RT).int().cumprod(dim=1).bool()
