"""What `benchmarks.speed.gpu` measures on, and its exact losses, computed beforehand without a GPU.

One random backbone of cpt-large's shape with prompts of trained ones' size. Exact losses are those of its
first two layers, which a CPU has in float64 in a minute, straight from the encoder; beside them lies how far
the CUDA engine's arithmetic on a CPU is from them in each precision, which says what a GPU may be off by.

    python -m benchmarks.speed.gpu_reference [--data DIR] [--scale full] [--out FILE]

With --data (which holds lcqmc/ and tnews/) the token lengths of these tasks' few-shot sets are written, too:
numbers only, for Table 4. Without --out it writes gpu_reference.npz beside this file. Ten minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command import one_line_errors
from benchmarks.speed.engine_work import TRAINED_PROJECTION, TRAINED_Z, shaped_backbone, task_inputs
from mp2.backbone import Backbone
from mp2.engine import Objective
from mp2.engine.cuda.backend import CUDA_PRECISIONS, CudaBackend
from mp2.heads import SpanHead
from mp2.prompts import PromptSet, random_prompts
from mp2.tasks import MrcInput

REFERENCE = Path(__file__).with_suffix(".npz")
PARITY_LAYERS = 2
TABLE4_TASKS = ("lcqmc", "tnews")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of all that is measured."""

    n_layers: int
    hidden: int
    n_heads: int
    prompt_tokens: int
    intrinsic_dim: int
    lengths: tuple[int, ...]  # of the examples whose losses are compared
    n_candidates: int  # that they are compared on
    apart: float  # times the size of trained prompts: their losses then differ by much more than rounding
    examples: tuple[int, int]  # number and tokens, where one shape is timed
    population: int
    generations: int  # of a layer, in Table 4
    matrix_size: int
    rounds: int
    n_mini: int | None  # examples of a run over the embedded backbone; None: all of the few-shot set


SCALES = {
    "full": Scale(
        n_layers=24,
        hidden=1024,
        n_heads=16,
        prompt_tokens=50,
        intrinsic_dim=300,
        lengths=(3, 17, 40, 64, 65, 128, 200),
        n_candidates=6,
        apart=10.0,
        examples=(32, 64),
        population=20,
        generations=6,
        matrix_size=8192,
        rounds=5,
        n_mini=None,
    ),
    "tiny": Scale(
        n_layers=3,
        hidden=64,
        n_heads=1,
        prompt_tokens=4,
        intrinsic_dim=6,
        lengths=(3, 17, 30),
        n_candidates=4,
        apart=1000.0,
        examples=(3, 8),
        population=4,
        generations=1,
        matrix_size=128,
        rounds=2,
        n_mini=2,
    ),
}


def make_backbone(scale: Scale, n_layers: int | None = None) -> Backbone:
    """The random backbone, or its first layers."""
    return shaped_backbone(n_layers or scale.n_layers, scale.hidden, scale.n_heads)


def make_prompts(scale: Scale, backbone: Backbone) -> PromptSet:
    """Deep prompts of trained ones' size; layers above the second have the projections of the first two."""
    m, d, n_layers = scale.prompt_tokens, scale.intrinsic_dim, backbone.config.n_layers
    made = random_prompts(backbone, "deep", prompt_tokens=1, intrinsic_dim=1)  # for what it says of itself
    rng = np.random.default_rng(0)
    pair = TRAINED_PROJECTION * rng.standard_normal((PARITY_LAYERS, d, m * scale.hidden), np.float32)
    span = rng.standard_normal((2, scale.hidden), np.float32) * scale.hidden**-0.5
    z = TRAINED_Z * rng.standard_normal((PARITY_LAYERS, made.meta.n_modules, d), np.float32)
    copies = -(-n_layers // PARITY_LAYERS)
    return replace(
        made,
        meta=replace(made.meta, prompt_tokens=m, intrinsic_dim=d),
        z=torch.from_numpy(z).repeat(copies, 1, 1)[:n_layers],
        projection=torch.from_numpy(pair).repeat(copies, 1, 1)[:n_layers],
        span_weight=torch.from_numpy(span),
    )


def make_inputs(lengths: Sequence[int], vocab_size: int) -> list[MrcInput]:
    """Random texts of ``lengths`` with random spans."""
    rng = np.random.default_rng(1)
    found = []
    for k, n in enumerate(lengths):
        start, end = sorted(int(x) for x in rng.integers(0, n, 2))
        ids = rng.integers(5, vocab_size, n)
        found.append(MrcInput(k, ids, start, end, np.empty((0, 2), np.int64)))
    return found


def make_candidates(scale: Scale) -> np.ndarray:
    """Intrinsic prompts [P, 2, d], far apart."""
    rng = np.random.default_rng(2)
    shape = (scale.n_candidates, PARITY_LAYERS, scale.intrinsic_dim)
    return scale.apart * TRAINED_Z * rng.standard_normal(shape, np.float32)


def parity_losses(objective: Objective, z: np.ndarray, n_layers: int) -> np.ndarray:
    """Losses [1 + 2, P] of candidates ``z`` [P, 2, d]: of all layers run, and of visits of either layer."""
    whole = np.zeros((len(z), n_layers, z.shape[2]), np.float32)
    whole[:, :PARITY_LAYERS] = z
    found = [objective.full_losses(whole).fetch()]
    objective.set_incumbent(whole[0])
    found += [objective.layer_losses(layer, z[:, layer]).fetch() for layer in range(PARITY_LAYERS)]
    return np.array(found)


def exact_losses(
    backbone: Backbone, prompts: PromptSet, inputs: Sequence[MrcInput], z: np.ndarray
) -> np.ndarray:
    """The same [1 + 2, P] in float64, an example and a candidate at a time, from the encoder itself."""
    encoder = backbone.encoder.double()
    span, bias = prompts.span_weight.double(), prompts.span_bias.double()

    def loss(own: np.ndarray) -> float:
        rows = torch.einsum("ld,ldx->lx", torch.from_numpy(own).double(), prompts.projection.double())
        rows = rows.view(PARITY_LAYERS, 1, prompts.meta.prompt_tokens, -1)
        prefixes = []
        for k in range(PARITY_LAYERS):
            body = encoder.body(k)
            prefixes.append(tuple(body.split_heads(part(rows[k])) for part in (body.key, body.value)))
        total = 0.0
        for item in inputs:
            hidden = encoder(torch.from_numpy(item.input_ids)[None], prefixes=prefixes)
            logp = (hidden[0] @ span.T + bias).log_softmax(0)
            total -= float(logp[item.start, 0] + logp[item.end, 1]) / 2
        return total / len(inputs)

    with torch.inference_mode():
        found = [[loss(own) for own in z]]
        for layer in range(PARITY_LAYERS):
            visited = np.repeat(z[:1], len(z), 0)
            visited[:, layer] = z[:, layer]
            found.append([loss(own) for own in visited])
    return np.array(found)


def make_reference(scale: Scale, data: Path | None) -> dict[str, np.ndarray]:
    """Everything that the file holds."""
    backbone = make_backbone(scale, PARITY_LAYERS)
    prompts, z = make_prompts(scale, backbone), make_candidates(scale)
    inputs = make_inputs(scale.lengths, backbone.config.vocab_size)
    found: dict[str, np.ndarray] = {"candidates": z, "probe": probe(backbone, prompts)}
    rough = {}
    for precision in CUDA_PRECISIONS:
        try:
            engine = CudaBackend(backbone, device="cpu", precision=precision)
            objective = Objective(engine.forward(prompts), inputs)
            rough[precision] = parity_losses(objective, z, PARITY_LAYERS)
            print(f"{precision} is done", file=sys.stderr, flush=True)
        except RuntimeError as error:  # fp8: torch 2.11 has no row-wise scales on CPUs
            print(f"no {precision} on this CPU: {str(error).splitlines()[0]}", file=sys.stderr)
    exact = exact_losses(backbone, prompts, inputs, z)
    found["losses"] = exact
    for precision, losses in rough.items():
        found[f"error_{precision}"] = np.abs(losses - exact).max()
    for task in TABLE4_TASKS if data else ():
        found[f"lengths_{task}"] = np.array([x.n_tokens for x in task_inputs(task, backbone, data, None)])
    found["made_by"] = np.array(json.dumps({"torch": torch.__version__, "numpy": np.__version__}))
    return found


def probe(backbone: Backbone, prompts: PromptSet) -> np.ndarray:
    """Some of the weights: whether random numbers there are the ones here."""
    body = backbone.encoder.body(PARITY_LAYERS - 1)
    parts = (backbone.encoder.word_embeddings.weight[7], body.output.weight[-1], prompts.projection[1, -1])
    return np.concatenate([x[-4:].detach().float().numpy() for x in parts])


def parity_head(prompts: PromptSet) -> SpanHead:
    """The head over the first two layers."""
    return SpanHead(prompts.span_weight, prompts.span_bias, PARITY_LAYERS)


@one_line_errors()
def main() -> None:
    """Compute and write the file, say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MP2_DATA"))
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--out", type=Path, default=REFERENCE)
    args = parser.parse_args()
    found: dict[str, Any] = make_reference(SCALES[args.scale], Path(args.data) if args.data else None)
    np.savez(args.out, **found)
    spread = np.ptp(found["losses"], axis=1)
    print("losses spread over", ", ".join(f"{x:.3g}" for x in spread))
    for name, value in found.items():
        if name.startswith("error_"):
            print(f"{name.removeprefix('error_')} is off by at most {float(value):.2g}")
    print(f"written: {args.out} ({args.out.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
