from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from kforcing import Design, PushForwardLM, SequentialConfig
from kforcing.cpu.compiler import machine

needs_kernels = pytest.mark.skipif(machine() is None, reason="kernels need llvmlite, and torch with OpenMP of GNU")
VOCAB = 23
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    ),
    "qwen2": Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64),
}


def make_backbone(name: str = "llama", seed: int = 0, scale: float = 8.0):
    """A random backbone whose distributions are far from uniform. Its config is its own: a test may change it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def make_sequential(backbone, k=4, coupling="gumbel", **parts):
    """A sequential student whose head, unlike a new one's, has something to say."""
    design = Design("sequential", coupling, sequential=SequentialConfig(**parts))
    student = PushForwardLM.from_backbone(backbone, k=k, design=design).eval()
    torch.nn.init.normal_(student.readout.correct.weight, std=0.5)
    return student
