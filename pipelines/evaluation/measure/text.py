"""Texts of the AR model and of every row: NLL under the AR model, diversity, Gen-PPL and MAUVE."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kforcing.backbone import load_ar
from kforcing.coupling import COUPLINGS
from kforcing.device import pick_device
from kforcing.loading import load_tokenizer
from kforcing.metrics.diversity import diversity
from kforcing.metrics.external import load_external
from kforcing.metrics.free_run import same_so_far
from kforcing.metrics.gen_ppl import gen_ppl
from kforcing.metrics.joint import independent
from kforcing.metrics.mauve import features, mauve
from kforcing.modeling import PushForwardLM
from pipelines.evaluation.decoders import EngineDecoder, MethodRow, slug
from pipelines.evaluation.measure.joint import BLOCK, joint_of, next_blocks
from pipelines.evaluation.measure.measurement import Measurement
from pipelines.evaluation.measure.prompts import Prompts, heldout


def references(folder: Path, measurement: Measurement, given: Any) -> dict[str, Any]:
    """The AR model's texts under each coupling, further texts of each prompt, and its next tokens after fixed contexts."""
    config, teacher = measurement.config.text, load_ar(measurement.subject.teacher).to(pick_device())
    prompts = heldout(measurement, config.prompts, config.prompt_tokens)
    decoders = {name: EngineDecoder(teacher, 1, name) for name in COUPLINGS}
    texts = {n: d.decode(prompts.tokens_RN, config.new_tokens, prompts.seeds).tokens_RT for n, d in decoders.items()}
    decoder, again = decoders["inverse_cdf"], []
    for i in range(max(1, config.mauve_seeds)):
        others = [seed + 1 + i for seed in prompts.seeds]
        again.append(decoder.decode(prompts.tokens_RN, config.new_tokens, others).tokens_RT)
    blocks = {name: next_blocks(measurement, decoder, name).numpy() for name in ("one", "two")}
    np.savez(folder / "blocks.npz", one=blocks["one"], two=blocks["two"])
    tokenizer = load_tokenizer(measurement.subject.tokenizer)
    joint = joint_of(measurement, torch.from_numpy(blocks["two"]), blocks["one"])
    apart = torch.stack([independent(torch.from_numpy(b), 0) for b in blocks["two"]])
    return {
        "prompts": [str(tokenizer.decode(p)) for p in prompts.tokens_RN.tolist()],
        "texts": {name: tokens.tolist() for name, tokens in texts.items()},
        "again": [tokens.tolist() for tokens in again],
        "joint": joint,
        "joint_independent": joint_of(measurement, apart, blocks["one"], joint["by_context"]),
        **text_figures(measurement, prompts, measurement.cut(again[0]), teacher),
    }


def row_figures(folder: Path, measurement: Measurement, given: Any) -> dict[str, Any]:
    """The texts of one row, and all its figures but speed."""
    row, config = measurement.row, measurement.config.text
    assert row is not None
    teacher = load_ar(measurement.subject.teacher).to(pick_device())
    prompts = heldout(measurement, config.prompts, config.prompt_tokens)
    decoder = measurement.decoder(row)
    done = decoder.decode(prompts.tokens_RN, config.new_tokens, prompts.seeds)
    figures = {
        "k": row.k,
        "method": row.method,
        "tokens": done.tokens_RT.tolist(),
        "passes": done.passes,
        **text_figures(measurement, prompts, measurement.cut(done.tokens_RT), teacher),
    }
    if row.same_noise:
        theirs = torch.tensor(given["references"]["texts"][row.coupling])
        figures |= _same_noise(measurement, prompts, done.tokens_RT.cpu(), theirs)
    if row.decoder != "assisted":  # it decodes one prompt at a time, which would take hours here
        reference = np.load(measurement.root / "references" / "blocks.npz", allow_pickle=False)["one"]
        floor = given["references"]["joint"]["by_context"]
        figures["joint"] = joint_of(measurement, next_blocks(measurement, decoder, "row"), reference, floor)
    return figures


def _same_noise(measurement: Measurement, prompts: Prompts, mine_RT: Tensor, theirs_RT: Tensor) -> dict[str, Any]:
    same = same_so_far(mine_RT, theirs_RT).double()
    sums = torch.stack([same[:, : min(BLOCK, same.shape[1])].amin(1), same.sum(1)], dim=1).numpy()
    block, until = measurement.over_documents(sums, np.ones(len(sums)), prompts.doc_R)
    return {"first_tokens_same": block, "tokens_until_divergence": until}


def text_figures(measurement: Measurement, prompts: Prompts, made: list[list[int]], teacher: Any) -> dict[str, Any]:
    """NLL under the AR model (two-sided) and diversity of continuations."""
    nll, counts = teacher_nll(teacher, prompts.tokens_RN, made)
    varied = diversity(made)
    intervals = varied.intervals(measurement.config.bootstrap, measurement.config.seed, prompts.doc_R)
    return {
        "nll": measurement.over_documents(nll[:, None], counts, prompts.doc_R)[0],
        **{name: asdict(figure) if figure else None for name, figure in intervals.items()},
        "distinct": {str(n): share for n, share in varied.distinct.items()},
    }


def teacher_nll(teacher: Any, prompts_RN: Tensor, made: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Σ −log p of each text under the AR model in nats, and the number of its tokens; both (R,) float64."""
    N, longest = prompts_RN.shape[1], max(map(len, made))
    sums, counts = np.zeros(len(made)), np.array([len(text) for text in made], dtype=float)
    rows_of_ids = [text + [0] * (longest - len(text)) for text in made]
    padded = torch.tensor(rows_of_ids, dtype=torch.int64, device=prompts_RN.device)
    with torch.inference_mode():
        for rows in torch.arange(len(made)).split(32):
            whole = torch.cat([prompts_RN[rows], padded[rows]], dim=1)
            logp = teacher(input_ids=whole[:, :-1], use_cache=False).logits[:, N - 1 :].float().log_softmax(-1)
            nll = -logp.gather(-1, padded[rows][..., None])[..., 0].double().cpu().numpy()
            sums[rows] = (nll * (np.arange(longest) < counts[rows][:, None])).sum(1)
    return sums, counts


def gen_ppl_of_rows(folder: Path, measurement: Measurement, given: dict[str, Any]) -> dict[str, Any]:
    """Gen-PPL of the texts of several rows; `AR again` is the AR model under other noise."""
    model = load_external(str(measurement.config.text.external))
    texts = {name: given[f"row-{slug(name)}"]["tokens"] for name in measurement.rows if name != "AR again"}
    if "AR again" in measurement.rows:
        texts["AR again"] = given["references"]["again"][0]
    prompts = given["references"]["prompts"]
    return {name: perplexity(measurement, model, prompts, made) for name, made in texts.items()}


def perplexity(
    measurement: Measurement, model: Any, prompts: list[str], made: list[list[int]]
) -> dict[str, Any] | None:
    """Gen-PPL of continuations with its interval, every token of the same weight; None when there is no token."""
    config, tokenizer = measurement.config, load_tokenizer(measurement.subject.tokenizer)
    texts = [str(tokenizer.decode(row)) for row in measurement.cut(torch.tensor(made))]
    found = gen_ppl(model, texts, prompts)
    doc_R = heldout(measurement, config.text.prompts, 1).doc_R
    intervals = found.intervals(config.bootstrap, config.seed, doc_R)
    return asdict(intervals["by_token"]) | {"by_document": found.by_document} if intervals else None


def frontier(folder: Path, measurement: Measurement, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Gen-PPL and entropy of the AR model and of the last student at other temperatures."""
    config, last = measurement.config.text, measurement.subject.last
    external, prompts = load_external(str(config.external)), heldout(measurement, config.prompts, config.prompt_tokens)
    teacher = load_ar(measurement.subject.teacher).to(pick_device())
    design = PushForwardLM.from_pretrained(last.path).config.design
    rows = [
        MethodRow("AR", 1, "ar", coupling=design.coupling),
        MethodRow(last.name, last.k, "engine", path=last.path, coupling=design.coupling),
    ]
    points = []
    for row in rows:
        for temperature in config.other_temperatures:
            if row.path and not design.conditional and design.noise.clamp(temperature) != temperature:
                continue  # this student was trained for other temperatures
            decoder = measurement.decoder(row, temperature)
            made = decoder.decode(prompts.tokens_RN, config.new_tokens, prompts.seeds).tokens_RT
            figures = text_figures(measurement, prompts, measurement.cut(made), teacher)
            ppl = perplexity(measurement, external, given["references"]["prompts"], made.tolist())
            point = {"name": row.name, "k": row.k, "coupling": row.coupling, "temperature": temperature, "gen_ppl": ppl}
            points.append({**point, **figures})
    return points


def mauve_of_rows(folder: Path, measurement: Measurement, given: dict[str, Any]) -> dict[str, Any]:
    """MAUVE of the texts of several rows against several texts of the AR model under other noise.

    The AR model's own figure is the ceiling. Values are means over the AR model's texts; `lo` and `hi` are the smallest
    and the largest.
    """
    model = load_external(str(measurement.config.text.external))
    tokenizer = load_tokenizer(measurement.subject.tokenizer)
    texts = {name: given[f"row-{slug(name)}"]["tokens"] for name in measurement.rows}

    def features_of(made: list[list[int]]) -> np.ndarray:
        rows = measurement.cut(torch.tensor(made))
        whole = [p + str(tokenizer.decode(row)) for p, row in zip(given["references"]["prompts"], rows, strict=True)]
        return features(model, whole)

    theirs = [features_of(made) for made in given["references"]["again"]]
    found = {}
    for name, made in texts.items():
        mine = features_of(made)
        values = [mauve(other, mine, None, seed) for seed, other in enumerate(theirs)]
        found[name] = {"value": statistics.mean(values), "lo": min(values), "hi": max(values)}
    return found
