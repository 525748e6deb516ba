"""`PushForwardLM`: k noise variables beside the context become a joint sample of the next k tokens in one pass."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.attention.reader import check_backbone
from kforcing.attention.windows import Context, Windows
from kforcing.backbone import build_backbone
from kforcing.coupling import COUPLINGS
from kforcing.design import Design, NoiseConfig, PushForwardConfig, SequentialConfig
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.readout.argmax import ArgmaxReadout
from kforcing.readout.base import BlockScores, Draw
from kforcing.readout.sequential import SequentialReadout

FORMAT_VERSION = 2


class PushForwardLM(nn.Module):
    """A causal LM that reads k noise variables and emits k tokens a forward pass (K-Forcing's student).

    The backbone is an AR model; the read-out, chosen by the config's design, makes k tokens of its states.
    """

    def __init__(self, config: PushForwardConfig, backbone: PreTrainedModel):
        super().__init__()
        self.config = config
        self.backbone = backbone.requires_grad_(not config.design.exact_trunk)
        self.readout = build_readout(config, backbone)

    @property
    def k(self) -> int:
        """Tokens of one forward pass."""
        return self.config.k

    @property
    def design(self) -> Design:
        """Read-out and coupling."""
        return self.config.design

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, k: int, design: Design | None = None) -> PushForwardLM:
        """Wrap an AR model: its weights are kept, the read-out is new (drawn from torch's global generator)."""
        check_backbone(backbone)
        parameter = next(backbone.parameters())
        record = {**backbone.config.to_dict(), "dtype": str(parameter.dtype).removeprefix("torch.")}
        student = cls(PushForwardConfig(k, record, design or Design()), backbone)
        student.readout.start(backbone)
        return student.to(device=parameter.device, dtype=parameter.dtype)

    def set_k(self, k: int) -> None:
        """Make this a student of another k with the same weights: how PFLM(2k) starts from PFLM(k)."""
        self.config = dataclasses.replace(self.config, k=k)
        self.readout.grow(k)

    def scores(self, windows: Windows, tokens_BWK: Tensor, context: Context | None = None) -> BlockScores:
        """What every token of the windows' blocks is read from, in one pass: see `Readout.scores`.

        Raises:
            ValueError: when the windows ask for more tokens than the student's k.
        """
        self._check_k(windows.k)
        return self.readout.scores(self.backbone, windows, tokens_BWK, context)

    def draw(self, windows: Windows, context: Context | None = None) -> Draw:
        """One step of decoding: the tokens that the windows' noise maps to.

        With the `context` of what was read before and the tokens since as `windows.prefix_BWP`, this is a cached step.
        """
        self._check_k(windows.k)
        return self.readout.draw(self.backbone, windows, context)

    def tokens(self, windows: Windows, context: Context | None = None) -> Tensor:
        """The (B, W, K) int64 tokens of `draw`, without keeping the logits they were picked from."""
        self._check_k(windows.k)
        return self.readout.tokens(self.backbone, windows, context)

    def forward(self, context_ids: Tensor, noise: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
        """Next-k-token logits: (B, N) int64 context and (B, K) noise, K ≤ k, → (B, K, V).

        Row j is what `student.readout.pick` reads token j from. Where it depends on the tokens before, they are the
        student's own under this noise.
        """
        return self.draw(one_window(context_ids, noise, temperature)).logits_BWKV[:, 0]

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
        """Continue prompts k tokens at a time, all in one batch of the engine (`kforcing.engine`).

        Noise is a function of (seed, absolute position) alone, so decoders of different k can be compared under it.

        Args:
            prompt_ids: (B, N) int64, or (N,) for one prompt.
            k: tokens a step, at most the student's k (the default).
            max_new_tokens: tokens returned at most for each prompt.
            seed: of the noise; two decoders with the same seed see the same z at the same position.
            eos_token_id: generation of a row ends before this token; what a block holds beyond it is dropped.
            temperature: of the distributions; an argmax student knows only those it was trained for.
        Returns:
            For each prompt its new token ids, without EOS.
        """
        rows = (prompt_ids[None] if prompt_ids.ndim == 1 else prompt_ids).tolist()
        if not rows or not rows[0]:
            raise ValueError(f"prompt_ids of shape {tuple(prompt_ids.shape)} hold no token to continue")
        config = EngineConfig(
            max_num_seqs=len(rows), max_model_len=len(rows[0]) + max(max_new_tokens, 1), k=k, packed=False
        )
        stop_ids = frozenset() if eos_token_id is None else frozenset([eos_token_id])
        sampling = SamplingParams(temperature)
        training = self.training
        try:
            done = Engine(self, config).generate(
                [Request(row, max_new_tokens, seed, stop_ids, sampling=sampling) for row in rows]
            )
        finally:
            self.train(training)
        return [completion.tokens for completion in done]

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.k:
            raise ValueError(f"k={k} tokens asked of a student of k={self.k}; choose 1 to {self.k}")

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
        backbone = build_backbone(config.backbone)
        student = cls(config, backbone).to(dtype=next(backbone.parameters()).dtype)
        load_model(student, str(Path(path) / "model.safetensors"), strict=True)
        return student.eval()


def build_readout(config: PushForwardConfig, backbone: PreTrainedModel) -> ArgmaxReadout | SequentialReadout:
    """The read-out a config asks for: the one place that tells designs apart by name."""
    design = config.design
    if design.readout == "argmax":
        return ArgmaxReadout(backbone, design.noise)
    return SequentialReadout(backbone, config.k, design.sequential, COUPLINGS[design.coupling])


def one_window(context_ids: Tensor, noise: Tensor, temperature: Tensor | float = 1.0) -> Windows:
    """(B, N) int64 contexts and their (B, K) noise, as one window at the end of each."""
    if context_ids.ndim != 2 or noise.ndim != 2 or len(context_ids) != len(noise):
        raise ValueError(
            f"expected context_ids (B, N) and noise (B, K), got {tuple(context_ids.shape)} and {tuple(noise.shape)}"
        )
    B, N = context_ids.shape
    anchors_BW = torch.full((B, 1), N - 1, device=context_ids.device)
    temperature_B = torch.as_tensor(temperature, dtype=torch.float64, device=context_ids.device).expand(B)
    return Windows(context_ids, anchors_BW, noise[:, None], temperature_B)


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
    design = record["design"]
    noise, sequential = NoiseConfig(**design.pop("noise")), SequentialConfig(**design.pop("sequential"))
    return PushForwardConfig(record["k"], record["backbone"], Design(**design, noise=noise, sequential=sequential))
