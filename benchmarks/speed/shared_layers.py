"""How much of stage I could be saved by computing what routers have in common only once: counted, not timed.

A layer's output depends on the router's bits of that layer and of those below. Candidates whose bits agree
up to layer l could share the layers 0 to l. This counts, in searches of the default method, which share of
the layers that are run (candidates x layers) is run for bits that were seen before: within the same
population (what an engine could share without keeping anything) and ever (with all hidden states of all
candidates kept). Layer 0 of a text before any prompt is shared already and counts as run.

    python -m benchmarks.speed.shared_layers [--task NAME ...] [--seed N ...] [--data DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from mp2.optimizers import create_router_search
from mp2.runs import BbtConfig
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import load_model, resolve_paths
from mp2.tasks import load_card

ITERATIONS = 100  # the paper's, deep


def shared(populations: list[np.ndarray]) -> dict[str, float]:
    """Share of layers, of all that ``populations`` of routers [P, L, K] run, whose bits were seen before."""
    total = within = ever = 0
    all_seen: set[bytes] = set()
    for routers in populations:
        seen: set[bytes] = set()
        for router in routers:
            for layer in range(1, len(router) + 1):
                key = router[:layer].tobytes()
                total += 1
                within += key in seen
                ever += key in seen or key in all_seen
                seen.add(key)
        all_seen |= seen
    return {"within_population": within / total, "ever": ever / total}


def populations_of(config: BbtConfig, method: str) -> list[np.ndarray]:
    """Populations of routers that ``method`` asks for on a task."""
    config = resolve_paths(config)
    model = load_model(config)
    problem, space = FewShotProblem(config, load_card(config.task), model), model.space()
    shape = (space.n_layers, space.n_modules)
    modules = np.asarray(model.prompts.z.detach().numpy())
    rng = np.random.default_rng(config.seed)
    search = create_router_search(method, shape, ITERATIONS, space.warm, rng, modules)
    found: list[np.ndarray] = []
    left = ITERATIONS
    while left > 0 and len(routers := search.ask(left)):
        search.tell(routers, problem.objective.router_losses(routers).fetch())
        found.append(routers)
        left -= len(routers)
    return found


@one_line_errors()
def main() -> None:
    """Count, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["demo_topic", "demo_sentiment"])
    parser.add_argument("--seed", nargs="+", type=int, default=[8, 13, 21])
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for task in args.task:
        for method in ("bits", "random"):
            found = []
            for seed in args.seed:
                data = str(args.data) if args.data and not task.startswith("demo_") else None
                config = BbtConfig(task=task, seed=seed, data=data, head="span", test=False)
                found.append(shared(populations_of(config, method)))
            row = {"task": task, "method": method, "seeds": args.seed, "iterations": ITERATIONS}
            for name in ("within_population", "ever"):
                row[name] = round(float(np.mean([x[name] for x in found])), 4)
            rows.append(row)
            shares = f"{row['within_population']:.1%} within a population, {row['ever']:.1%} ever"
            print(f"{task:16} {method:7} {shares}")
    print("written:", save("shared_layers", rows))


if __name__ == "__main__":
    main()
