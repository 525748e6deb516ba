"""`PushForwardLM`: k noise variables beside the context become a joint sample of the next k tokens in one pass."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kforcing.noise import derive_key, uniform
from kforcing.staircase import embeddings, head, lm_head, staircase_states

FORMAT_VERSION = 1


@dataclass(frozen=True)
class NoiseConfig:
    """How a hint's noise enters the network."""

    min_cycles: float = 1e-4
    """Lowest frequency of the sinusoids of z, in cycles over [0, 1)."""
    max_cycles: float = 1.0
    """Highest frequency of the sinusoids of z, in cycles over [0, 1). The paper's release stops at 1."""
    temperature_min: float = 1.0
    """Lowest temperature the student is trained for."""
    temperature_max: float = 1.0
    """Highest temperature the student is trained for; equal to the lowest for a student of one temperature."""

    def check(self) -> None:
        """Raise ValueError unless both ranges are positive and in order."""
        if not 0 < self.min_cycles < self.max_cycles:
            raise ValueError(f"noise cycles must satisfy 0 < min < max, got {self.min_cycles} and {self.max_cycles}")
        if not 0 < self.temperature_min <= self.temperature_max:
            raise ValueError(
                f"temperatures must satisfy 0 < min ≤ max, got {self.temperature_min} and {self.temperature_max}"
            )

    def clamp(self, temperature: float) -> float:
        """The temperature nearest to the given one that the student is trained for."""
        return min(max(temperature, self.temperature_min), self.temperature_max)


@dataclass(frozen=True)
class PushForwardConfig:
    """Everything needed to rebuild a `PushForwardLM` without its weights."""

    k: int
    """Tokens of one forward pass."""
    backbone: dict[str, Any]
    """The Hugging Face config of the backbone, as `PretrainedConfig.to_dict` gives it."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        self.noise.check()


class NoiseEncoder(nn.Module):
    """(z, τ) → hint embedding: sinusoids of both → Linear(2·width → width) → x + MLP(LN(x)), MLP 4× with GELU."""

    def __init__(self, width: int, config: NoiseConfig):
        super().__init__()
        if width % 2:
            raise ValueError(f"the noise encoder needs an even width, the backbone has {width}")
        self.config = config
        self.project = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, noise: Tensor, temperature: Tensor) -> Tensor:
        """(...) noise in [0, 1) and (...) temperatures → (..., width), in the dtype of the weights."""
        half = self.project.out_features // 2
        low, high = math.log(self.config.min_cycles), math.log(self.config.max_cycles)
        cycles = torch.linspace(low, high, half, device=noise.device).exp() * (2 * math.pi)
        z_angle = noise.float()[..., None] * cycles
        t_angle = temperature.float()[..., None] * cycles
        features = torch.cat([z_angle.sin(), z_angle.cos(), t_angle.sin(), t_angle.cos()], dim=-1)
        x = self.project(features.to(self.project.weight.dtype))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class PushForwardLM(nn.Module):
    """A causal LM that reads k noise variables and emits k tokens a forward pass (K-Forcing's student).

    Hint j carries z_j, stands at the position of the token it predicts, sees the context and hints 1..j, and its
    argmax through the shared LM head is token j.
    """

    def __init__(self, config: PushForwardConfig, backbone: PreTrainedModel):
        super().__init__()
        self.config = config
        self.backbone = backbone
        width = embeddings(backbone).weight.shape[1]
        self.noise_encoder = NoiseEncoder(width, config.noise)

    @property
    def k(self) -> int:
        """Tokens of one forward pass."""
        return self.config.k

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, k: int, noise: NoiseConfig | None = None) -> PushForwardLM:
        """Wrap an AR model: its weights are kept, the noise encoder is new (drawn from torch's global generator)."""
        check_backbone(backbone)
        student = cls(PushForwardConfig(k, backbone.config.to_dict(), noise or NoiseConfig()), backbone)
        # Hints should look like tokens to the first layer: match the scale of the token embeddings.
        scale = embeddings(backbone).weight.float().std().item()
        with torch.no_grad():
            probe = torch.linspace(0, 1, 257)[:-1]
            spread = student.noise_encoder(probe, torch.ones_like(probe)).std().item()
            for layer in (student.noise_encoder.project, student.noise_encoder.down):
                layer.weight.mul_(scale / spread)
                layer.bias.mul_(scale / spread)
        parameter = next(backbone.parameters())
        return student.to(device=parameter.device, dtype=parameter.dtype)

    def set_k(self, k: int) -> None:
        """Make this a student of another k with the same weights: how PFLM(2k) starts from PFLM(k)."""
        self.config = dataclasses.replace(self.config, k=k)

    def window_logits(
        self,
        context_BN: Tensor,
        anchors_BW: Tensor,
        noise_BWK: Tensor,
        prefix_BWP: Tensor | None = None,
        temperature_B: Tensor | None = None,
    ) -> Tensor:
        """Logits of all hints of all windows, in one staircase pass.

        Args:
            context_BN: int64 token ids.
            anchors_BW: int64, last context position each window sees.
            noise_BWK: uniforms in [0, 1), K ≤ k.
            prefix_BWP: int64 tokens already committed in each window, between context and hints; none by default.
            temperature_B: one temperature a sequence; 1 by default.
        Returns:
            (B, W, K, V) logits in the dtype of the weights.
        Raises:
            ValueError: when K exceeds the student's k.
        """
        K = noise_BWK.shape[2]
        if self.k < K:
            raise ValueError(f"{K} noise variables for a student of k={self.k}; pass at most {self.k}")
        if temperature_B is None:
            temperature_B = torch.ones(len(context_BN), device=context_BN.device)
        block = self.noise_encoder(noise_BWK, temperature_B[:, None, None].expand_as(noise_BWK))
        if prefix_BWP is not None and prefix_BWP.shape[2]:
            prefix = embeddings(self.backbone)(prefix_BWP)
            block = torch.cat([prefix, block.to(prefix.dtype)], dim=2)
        _, states_BWLD = staircase_states(self.backbone, context_BN, anchors_BW, block)
        return lm_head(self.backbone, states_BWLD[:, :, -K:])

    def forward(self, context_ids: Tensor, noise: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
        """Next-k-token logits: (B, N) int64 context and (B, K) noise, K ≤ k, → (B, K, V)."""
        if context_ids.ndim != 2 or noise.ndim != 2 or len(context_ids) != len(noise):
            raise ValueError(
                f"expected context_ids (B, N) and noise (B, K), got {tuple(context_ids.shape)} and {tuple(noise.shape)}"
            )
        B, N = context_ids.shape
        anchors_BW = torch.full((B, 1), N - 1, device=context_ids.device)
        temperature_B = torch.as_tensor(temperature, dtype=torch.float32, device=context_ids.device).expand(B)
        return self.window_logits(context_ids, anchors_BW, noise[:, None], temperature_B=temperature_B)[:, 0]

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        *,
        k: int | None = None,
        max_new_tokens: int,
        seed: int = 0,
        eos_token_id: int | None = None,
        temperature: float = 1.0,
    ) -> list[list[int]]:
        """Continue prompts k tokens at a time; noise is a function of (seed, absolute position) alone.

        Each step runs the whole context again: this is the plain reference decoder.

        Args:
            prompt_ids: (B, N) int64, or (N,) for one prompt.
            k: tokens a step, at most the student's k (the default).
            max_new_tokens: tokens returned at most for each prompt.
            seed: of the noise; two decoders with the same seed see the same z at the same position.
            eos_token_id: generation of a row ends before this token; what a block holds beyond it is dropped.
        Returns:
            For each prompt its new token ids, without EOS.
        """
        k = self.k if k is None else k
        if not 1 <= k <= self.k:
            raise ValueError(f"k={k} asked of a student of k={self.k}; choose 1 to {self.k}")
        self._check_temperature(temperature)

        def step(ids: Tensor, noise: Tensor) -> Tensor:
            return self(ids, noise, temperature).argmax(dim=-1)

        limit = getattr(self.backbone.config, "max_position_embeddings", None)
        return decode(step, prompt_ids, k, max_new_tokens, seed, eos_token_id, limit)

    def _check_temperature(self, temperature: float) -> None:
        low, high = self.config.noise.temperature_min, self.config.noise.temperature_max
        if not low <= temperature <= high:
            raise ValueError(f"temperature={temperature} asked of a student trained for {low} to {high}")

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`; no pickle."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / "model.safetensors"))
        write_config(folder, self.config)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> PushForwardLM:
        """Load what `save_pretrained` wrote. Missing or unexpected weights are an error."""
        config = read_config(path)
        student = cls(config, build_backbone(config.backbone))
        load_model(student, str(Path(path) / "model.safetensors"), strict=True)
        return student.eval()


def write_config(path: str | os.PathLike[str], config: PushForwardConfig) -> None:
    """Write a student's `config.json`."""
    record = {"model_type": "kforcing", "format_version": FORMAT_VERSION, **dataclasses.asdict(config)}
    (Path(path) / "config.json").write_text(json.dumps(record, indent=2, sort_keys=True))


def read_config(path: str | os.PathLike[str]) -> PushForwardConfig:
    """Read a student's `config.json`. Raises FileNotFoundError or ValueError when it is not a student's folder."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {path}; expected a folder written by PushForwardLM.save_pretrained")
    record = json.loads(file.read_text())
    if record.pop("model_type", None) != "kforcing":
        raise ValueError(f"{file} does not describe a PushForwardLM; load plain causal LMs with transformers")
    version = record.pop("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{file} has format version {version}; this release reads version {FORMAT_VERSION}")
    return PushForwardConfig(record["k"], record["backbone"], NoiseConfig(**record["noise"]))


def build_backbone(config: dict[str, Any]) -> PreTrainedModel:
    """A randomly initialised causal LM from its config dictionary, in the config's dtype, with sdpa attention."""
    hf_config = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa")


def check_backbone(backbone: PreTrainedModel) -> None:
    """Raise ValueError unless the backbone's logits are its LM head applied to its base model's states.

    Soft-capped or scaled logits would silently be lost by the shared head of the hints.
    """
    vocabulary = head(backbone).weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, 8, device=next(backbone.parameters()).device).long()[None]
    with torch.no_grad():
        whole = backbone(input_ids=ids, use_cache=False).logits
        parts = lm_head(backbone, backbone.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(backbone).__name__} changes its logits after the LM head (scaling or soft-capping); the hints "
            "share the head and would not see it. Choose a backbone without such a step, like Llama, Qwen or GPT-2."
        )


def decode(step, prompt_ids: Tensor, k: int, max_new_tokens: int, seed: int, eos: int | None, limit: int | None):
    """The decode loop shared by push-forward and AR reference decoders.

    `step` maps (B, n) ids and (B, k) noise to (B, k) tokens. The token at absolute position p is made from
    z(seed, p), whatever k is, so decoders of different k can be compared under the same noise.
    """
    ids = prompt_ids[None] if prompt_ids.ndim == 1 else prompt_ids
    B, N = ids.shape
    if N < 1 or max_new_tokens < 1:
        raise ValueError(f"need a prompt and at least one new token, got {N} and {max_new_tokens}")
    if limit is not None and N + max_new_tokens + k - 1 > limit:
        raise ValueError(
            f"{N} prompt tokens + {max_new_tokens} new ones (+ {k - 1} of a last block) exceed the model's {limit} "
            "positions; shorten the prompt or ask for fewer tokens"
        )
    key = derive_key(seed, "decode")
    zero = torch.zeros(1, dtype=torch.int64, device=ids.device)
    for start in range(N, N + max_new_tokens, k):
        noise_K = uniform(key, zero, 0, torch.arange(start, start + k, device=ids.device))
        ids = torch.cat([ids, step(ids, noise_K.expand(B, k))], dim=1)
    rows = [row[N : N + max_new_tokens] for row in ids.tolist()]
    return [row[: row.index(eos)] if eos is not None and eos in row else row for row in rows]
