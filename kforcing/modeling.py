"""`PushForwardLM`: one forward pass turns k noise variables and a context into a joint sample of the next k tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel

from kforcing.attention.reader import check_backbone
from kforcing.attention.windows import Context, Windows
from kforcing.backbone import build_backbone
from kforcing.configuration import PushForwardConfig
from kforcing.coupling import COUPLINGS
from kforcing.design import Design
from kforcing.engine import Completion, Engine, EngineConfig, Request, SamplingParams
from kforcing.generation import generation_settings, make_requests, new_token_limit, prompt_rows, with_continuations
from kforcing.readout.argmax import ArgmaxReadout
from kforcing.readout.base import BlockScores, Draw
from kforcing.readout.sequential import SequentialReadout


class PushForwardLM(PreTrainedModel, GenerationMixin):
    """A causal LM that reads k noise variables and emits k tokens in one forward pass: the student of K-Forcing.

    The backbone is an AR model. The read-out, which the config's design chooses, turns its states into k tokens.

    Args:
        config: k, the backbone's config and the design.
        backbone: an AR model to wrap; by default a new one is built from the config, with random weights.
    """

    config_class = PushForwardConfig
    config: PushForwardConfig
    _supports_sdpa = True

    def __init__(self, config: PushForwardConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if backbone is None:
            backbone = build_backbone({**config.backbone, "dtype": config.dtype})
        self.backbone = backbone.requires_grad_(not config.design.exact_trunk)
        self.readout = build_readout(config, backbone)
        self.post_init()

    def init_weights(self) -> None:
        """Do nothing: backbone and read-out have initialised their own weights when they were made."""

    def get_input_embeddings(self) -> Any:
        """The token embedding of the backbone."""
        return self.backbone.get_input_embeddings()

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
        """Wrap an AR model. Its weights are kept; the read-out's are drawn from torch's global generator."""
        check_backbone(backbone)
        parameter = next(backbone.parameters())
        record = {**backbone.config.to_dict(), "dtype": str(parameter.dtype).removeprefix("torch.")}
        student = cls(PushForwardConfig(k, record, design), backbone)
        if backbone.generation_config is not None:
            student.generation_config = copy.deepcopy(backbone.generation_config)
        student.readout.start(backbone)
        return student.to(device=parameter.device, dtype=parameter.dtype)  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a student from a folder or hub id, with the arguments of `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            FileNotFoundError: when the folder has no config.json.
            ValueError: when the config does not describe a student.
            RuntimeError: when weights are missing or unexpected.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        student, info = loaded
        if wrong := {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys") if info[name]}:
            raise RuntimeError(f"the weights of {pretrained_model_name_or_path} do not fit its config: {wrong}")
        # Loading replaces parameters by trainable ones, and the teacher's EOS ids lie in the student's folder.
        student.backbone.requires_grad_(not student.design.exact_trunk)
        student.backbone.generation_config = copy.deepcopy(student.generation_config)
        return (student, info) if wants_info else student

    def set_k(self, k: int) -> None:
        """Make this a student of another k with the same weights: how PFLM(2k) starts from PFLM(k)."""
        self.config = PushForwardConfig(**{**self.config.to_dict(), "k": k})
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

    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        k: int | None = None,
        acceptance: str = "fixed",
        seed: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue prompts as `generate` of transformers does; the engine makes k tokens a step.

        Honoured in `generation_config` and as arguments: `max_new_tokens`, `max_length`, `do_sample`, `temperature`, `top_k`,
        `top_p`, `eos_token_id` (one or several), `pad_token_id` and `num_return_sequences`. Two defaults differ:
        sampling draws from the whole distribution unless `top_k` is given, and an argmax student cannot be greedy.

        Args:
            input_ids: (B, N) int64 prompts, padded on the left.
            attention_mask: (B, N), 0 where a prompt is padded.
            generation_config: settings that take precedence over those of the student.
            k: tokens of a step, at most the student's k, which is the default.
            acceptance: `fixed` keeps the k tokens of every step. `exact` keeps those that the AR model inside the student
                draws itself, so that the continuation is the AR model's own; see `kforcing.engine.Request`.
            seed: the noise of position p is z(seed, p) in every row. By default each row draws its seed from torch's
                global generator, so that `transformers.set_seed` repeats a call.
            kwargs: settings that take precedence over those of `generation_config`.
        Returns:
            (B · num_return_sequences, N + new) int64 prompts and continuations. A row that ends earlier than the longest
            holds its EOS and then pad tokens.
        Raises:
            ValueError: names a setting that cannot be honoured, or what is wrong with the prompts.
        """
        settings = generation_settings(self.generation_config, generation_config, kwargs)
        if not settings.do_sample and not self.design.conditional:
            raise ValueError(
                "do_sample=False asks for the likeliest tokens, but an argmax student has no distribution to take them "
                "from; pass do_sample=True"
            )
        rows = prompt_rows(input_ids, attention_mask, settings)
        requests = make_requests(rows, settings, new_token_limit(settings, input_ids.shape[1]), seed)
        return with_continuations(input_ids, self._run(requests, k, acceptance), settings)

    def continue_prompts(
        self,
        prompt_ids: Tensor,
        *,
        k: int | None = None,
        max_new_tokens: int,
        acceptance: str = "fixed",
        seed: int = 0,
        eos_token_id: int | None = None,
        temperature: float = 1.0,
    ) -> list[list[int]]:
        """Continue prompts of equal length by sampling: the short form of `generate`, which returns new tokens only.

        Noise is a function of (seed, absolute position) alone, so decoders of different k can be compared under it.

        Args:
            prompt_ids: (B, N) int64, or (N,) for one prompt.
            k: tokens of a step, at most the student's k, which is the default.
            max_new_tokens: the largest number of tokens that are returned for each prompt.
            acceptance: `fixed` or `exact`, as in `generate`.
            seed: of the noise. Two decoders with the same seed see the same z at the same position.
            eos_token_id: a continuation ends before this token; the rest of its block is dropped.
            temperature: of the distributions. An argmax student accepts only temperatures that it was trained for.
        Returns:
            For each prompt its new token ids, without EOS.
        """
        rows = (prompt_ids[None] if prompt_ids.ndim == 1 else prompt_ids).tolist()
        if not rows or not rows[0]:
            raise ValueError(f"prompt_ids of shape {tuple(prompt_ids.shape)} hold no token to continue")
        stop_ids = frozenset() if eos_token_id is None else frozenset([eos_token_id])
        params = SamplingParams(temperature)
        requests = [Request(row, max_new_tokens, seed, stop_ids, sampling=params) for row in rows]
        return [completion.tokens for completion in self._run(requests, k, acceptance)]

    def _run(self, requests: list[Request], k: int | None, acceptance: str) -> list[Completion]:
        """Run requests in one batch of a new engine. The student keeps its training mode."""
        longest = max(len(request.prompt) + max(request.max_new_tokens or 1, 1) for request in requests)
        config = EngineConfig(
            max_num_seqs=len(requests), max_model_len=longest, k=k, acceptance=acceptance, row_kernel=False
        )
        training = self.training
        try:
            return Engine(self, config).generate(requests)
        finally:
            self.train(training)

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.k:
            raise ValueError(f"k={k} tokens asked of a student of k={self.k}; choose 1 to {self.k}")


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


AutoModel.register(PushForwardConfig, PushForwardLM)
AutoModelForCausalLM.register(PushForwardConfig, PushForwardLM)
