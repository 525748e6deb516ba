"""Fidelity of a student to its AR teacher in windows of held-out text, under the same noise.

match_j       share of windows whose j-th student token equals the AR teacher's coupled token
block_match   share of windows in which all k tokens are equal
student_nll   −log p of the student's tokens under the AR teacher
teacher_nll   −log p of the teacher's own tokens. The comparison is two-sided: a student whose tokens are *likelier*
              than the teacher's own has collapsed towards modes
target_nll    −log p_j of the teacher's coupled token under the student, which is the training loss on held-out data
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.attention.reader import ar_block_states
from kforcing.attention.windows import Windows, read_context
from kforcing.backbone import head
from kforcing.coupling import COUPLINGS
from kforcing.distillation.losses import token_nll
from kforcing.distillation.teachers import ARTeacher
from kforcing.modeling import PushForwardLM


@dataclass(frozen=True)
class WindowScores:
    """Figures of each window and offset, all (B, W, K)."""

    match: Tensor
    student_nll: Tensor
    teacher_nll: Tensor
    target_nll: Tensor


@torch.inference_mode()
def window_scores(student: PushForwardLM, teacher: PreTrainedModel, windows: Windows) -> WindowScores:
    """Run student and AR teacher on the same windows and the same noise, under the student's coupling.

    Args:
        student: its k is at least that of the windows.
        teacher: the AR model.
    """
    context, own = (read_context(model, windows.context_BN) for model in (teacher, student.backbone))
    mine = student.tokens(windows, own)
    theirs = ARTeacher(teacher, COUPLINGS[student.config.design.coupling]).rollout(windows, context)
    scores = student.scores(windows, theirs, own)

    def teacher_nll(tokens_BWK: Tensor) -> Tensor:
        return token_nll(head(teacher), ar_block_states(teacher, context, windows.anchors_BW, tokens_BWK), tokens_BWK)

    return WindowScores(
        match=mine == theirs,
        student_nll=teacher_nll(mine),
        teacher_nll=teacher_nll(theirs),
        target_nll=token_nll(scores.head, scores.states_BWKD, theirs),
    )
