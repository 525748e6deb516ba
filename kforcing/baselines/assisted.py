"""Assisted generation of `transformers`: a small AR model drafts tokens, and the large one accepts or resamples them.

This is speculative sampling (Leviathan et al. 2023). It takes one prompt at a time, and its text has the distribution of the
large model's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kforcing.baselines.base import Decoded


def draft_model(backbone: PreTrainedModel, layers: int = 1) -> PreTrainedModel:
    """An untrained AR model of the same family, width and vocabulary with fewer layers. Embeddings and LM head are copied."""
    config = copy.deepcopy(backbone.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-layers:]
    draft = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    draft.get_input_embeddings().load_state_dict(backbone.get_input_embeddings().state_dict())  # type: ignore[union-attr]
    draft.get_output_embeddings().load_state_dict(backbone.get_output_embeddings().state_dict())  # type: ignore[union-attr]
    return draft


class AssistedDecoder:
    """Sampling by `generate` of `transformers`, with a draft model or without one."""

    def __init__(self, backbone: PreTrainedModel, draft: PreTrainedModel | None):
        self.backbone: Any = backbone.eval()
        self.draft = draft.eval() if draft else None
        for model in filter(None, (self.backbone, self.draft)):
            # Without this, the model's own defaults (for example a temperature) would replace arguments that `decode` does
            # not give. Without an EOS all texts have the same length, like those of the other decoders.
            model.generation_config = GenerationConfig()
            model.config.eos_token_id = None

    @torch.inference_mode()
    def decode(self, prompts_RN: Tensor, new_tokens: int, seeds: list[int]) -> Decoded:
        """Continue prompts; see `kforcing.baselines.base.Decoder`.

        The noise comes from torch's generator, seeded by the rows' seeds. Passes of both models count.
        """
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        models = [self.backbone] + ([self.draft] if self.draft else [])
        hooks = [model.register_forward_pre_hook(count) for model in models]
        batches = prompts_RN.split(1 if self.draft else len(prompts_RN))
        try:
            made = []
            for i, batch in enumerate(batches):
                torch.manual_seed(seeds[i])
                options = {"assistant_model": self.draft} if self.draft else {}
                config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new_tokens, pad_token_id=0)
                out = self.backbone.generate(
                    batch, attention_mask=torch.ones_like(batch), generation_config=config, **options
                )
                made.append(out[:, batch.shape[1] :])
        finally:
            for hook in hooks:
                hook.remove()
        tokens = torch.cat(made)
        return Decoded(tokens, passes / len(batches) / new_tokens)
