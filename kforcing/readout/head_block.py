"""The transformer block of a sequential student's head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

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
        """Keys and values of (T, L, D) entries whose outputs are not needed."""
        _, k, v = self._qkv(x_TLD)
        return k, v

    def forward(self, x_TLD: Tensor, past: Past) -> tuple[Tensor, Past]:
        """(T, L, D) new entries after those in `past` → their (T, L, D) outputs, and keys and values of all."""
        T, L, _ = x_TLD.shape
        q, k, v = self._qkv(x_TLD)
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = torch.ones(L, k.shape[2], dtype=torch.bool, device=k.device).tril(k.shape[2] - L) if L > 1 else None
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_TLD = x_TLD + self.out(mixed.transpose(1, 2).reshape(T, L, -1))
        return x_TLD + self.down(gelu(self.up(self.mlp_norm(x_TLD)))), (k, v)
