"""The layers that the hints of a sequential student go through: copies of the trunk's last layers, or low-rank adapters."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from kforcing.design import SequentialConfig


class LowRank(nn.Module):
    """A linear map of the trunk plus a low-rank map: base(x) + up(down(x)). The second term is zero at first (LoRA)."""

    def __init__(self, base: Any, rank: int):
        super().__init__()
        self._base = (base,)  # in a tuple, because it must not be registered here: it is a module of the trunk
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
