"""Rows of `benchmarks.speed.throughput` from its rounds: times, ratios, shares, agreement, with ranges."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.speed.rounds import spread, verdict
from benchmarks.speed.throughput_rounds import Record
from mp2.engine.agreement import spearman

RATIO_TARGET = 6.0  # times the plain loop, stage II
SHARE_TARGET = 0.85  # of the matrix rate, the whole forward of stage I
_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def rows(rounds: Sequence[Record]) -> list[dict[str, Any]]:
    """Return a row for each engine of the ``rounds`` of one shape and task."""
    exact = next((name for name, own in rounds[0]["engines"].items() if own["precision"] == "fp32"), None)
    return [row(rounds, name, None if exact in (None, name) else exact) for name in rounds[0]["engines"]]


def row(rounds: Sequence[Record], name: str, exact: str | None) -> dict[str, Any]:
    """Return what ``rounds`` say of engine ``name``, its losses held against those of ``exact``."""
    facts = rounds[0]
    own = [r["engines"][name] for r in rounds]
    lengths, population, n_layers = facts["lengths"], facts["population"], facts["layers"]
    full, upper = facts["visit_flops"][0], mean(facts["visit_flops"])  # stage I is as a visit of layer 0
    plain = [r["plain_s"] for r in rounds]
    stage1 = [x["stage1_s"] / facts.get("routers", population) for x in own]
    seen = [r.get("visited", list(range(n_layers))) for r in rounds]
    by_layer: dict[int, list[float]] = {}
    for layers, x in zip(seen, own, strict=True):
        for layer, spent in zip(layers, x["stage2_s"], strict=True):
            by_layer.setdefault(layer, []).append(1e3 * spent / population)
    stage2 = [mean(x["stage2_s"]) / population for x in own]
    ratios = [a / b for a, b in zip(plain, stage2, strict=True)]
    rates = [x["matrix_rate"] for x in own]
    same_type = _TYPES.get(own[0]["precision"]) == own[0]["matrix_dtype"]
    shares = [full / s / rate for s, rate in zip(stage1, rates, strict=True)]
    return {
        **{
            key: facts[key] for key in ("shape", "layers", "hidden", "prompt_tokens", "intrinsic_dim", "task")
        },
        "runtime": own[0]["runtime"],
        "precision": own[0]["precision"],
        "device": facts["device"],
        "n_examples": len(lengths),
        "mean_tokens": round(mean(lengths), 1),
        "max_tokens": max(lengths),
        "measured": [rounds[0]["time"], rounds[-1]["time"]],
        "plain_ms": spread([1e3 * s for s in plain], 2),
        "rivals_ms": {
            rival: spread([1e3 * r["rivals_s"][rival] for r in rounds], 3) for rival in facts["rivals_s"]
        },
        "stage1_ms": spread([1e3 * s for s in stage1], 3),
        "stage2_ms": spread([1e3 * s for s in stage2], 3),
        "stage2_layer_ms": {layer: round(median(ms), 2) for layer, ms in sorted(by_layer.items())},
        "stage1_ratio": spread([a / b for a, b in zip(plain, stage1, strict=True)], 3),
        "stage2_ratio": spread(ratios, 3),
        "rival_ratios": {
            rival: spread([r["rivals_s"][rival] / s for r, s in zip(rounds, stage2, strict=True)], 3)
            for rival in facts["rivals_s"]
        },
        "stage2_ratio_target": RATIO_TARGET,
        "stage2_ratio_verdict": verdict(ratios, RATIO_TARGET),
        "tokens_per_s": round(sum(lengths) / median(stage1)),
        "matrix_dtype": own[0]["matrix_dtype"],
        "matrix_gflops": spread([rate / 1e9 for rate in rates], 1),
        "stage1_gflops": spread([full / s / 1e9 for s in stage1], 1),
        "stage1_share": spread(shares, 3),
        "stage1_share_target": SHARE_TARGET,
        "stage1_share_verdict": verdict(shares, SHARE_TARGET) if same_type else "",  # else no share of it
        "stage2_share": spread([upper / s / rate for s, rate in zip(stage2, rates, strict=True)], 3),
        "peak_mb": round(max(x["peak_mb"] for x in own)),
        **({} if exact is None else agreement(rounds, name, exact)),
    }


def agreement(rounds: Sequence[Record], name: str, exact: str) -> dict[str, Any]:
    """How the losses of every layer's populations agree with those of ``exact``, an engine in fp32.

    The rank agreement's least and median over layers and rounds; of the errors the largest and of the spreads
    (largest less smallest loss of a population) the least, both relative to the mean loss.
    """
    ranks, errors, spreads = [], [], []
    for record in rounds:
        pair = (record["engines"][engine]["losses"] for engine in (exact, name))
        for reference, losses in zip(*map(np.array, pair), strict=True):
            ranks.append(spearman(reference, losses))
            errors.append(float(np.abs(losses - reference).max() / reference.mean()))
            spreads.append(float(np.ptp(reference) / reference.mean()))
    return {
        "agreement_with": exact,
        "spearman_min": round(min(ranks), 5),
        "spearman_median": round(median(ranks), 5),
        "spearman_populations": len(ranks),
        "spearmans": [round(x, 4) for x in ranks],
        "loss_error_max": float(f"{max(errors):.2g}"),
        "loss_spread_min": float(f"{min(spreads):.2g}"),
    }
