"""The model that a stage begins with: a new AR model, a wrapped teacher, or the previous student with a larger k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from kforcing.backbone import load_ar
from kforcing.chunking import CHUNK
from kforcing.design import Design
from kforcing.distillation.steps import ARStep, StudentStep
from kforcing.distillation.text import TEXT_LOSSES, TextStep
from kforcing.modeling import PushForwardLM
from kforcing.remote import fetch
from pipelines.config.schema import TeacherConfig


def llama_config(teacher: TeacherConfig, vocab_size: int, eos: int) -> LlamaConfig:
    """The AR model that a run trains from scratch."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=teacher.hidden,
        num_hidden_layers=teacher.layers,
        num_attention_heads=teacher.heads,
        intermediate_size=teacher.mlp,
        max_position_embeddings=teacher.max_positions,
        bos_token_id=eos,
        eos_token_id=eos,
    )


@dataclass(frozen=True)
class AR:
    """A new AR model of Llama's kind."""

    config: TeacherConfig
    vocab_size: int
    eos: int
    seed: int

    def build(self, chunk: int = CHUNK) -> nn.Module:
        """A new causal LM, the same on every worker."""
        torch.manual_seed(self.seed)
        config = llama_config(self.config, self.vocab_size, self.eos)
        return ARStep(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), chunk)


@dataclass(frozen=True)
class Wrapped:
    """A student with an AR model's weights and a new read-out."""

    teacher: str
    k: int
    design: Design
    loss: str
    seed: int
    sampled_tokens: int = 0
    """Of a loss on text: see `TextStep`."""

    def build(self, chunk: int = CHUNK) -> nn.Module:
        """The wrapped teacher, the same on every worker."""
        torch.manual_seed(self.seed)
        student = PushForwardLM.from_backbone(load_ar(str(fetch(self.teacher))), self.k, self.design)
        if self.loss in TEXT_LOSSES:
            return TextStep(student, self.loss, self.sampled_tokens, chunk)
        return StudentStep(student, self.loss, chunk)


@dataclass(frozen=True)
class Grown:
    """A student with another student's weights and a larger k."""

    previous: str
    k: int
    loss: str

    def build(self, chunk: int = CHUNK) -> nn.Module:
        """The previous student, with its new k."""
        student = PushForwardLM.from_pretrained(fetch(self.previous))
        student.set_k(self.k)
        return StudentStep(student, self.loss, chunk)
