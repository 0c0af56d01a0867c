"""Figure 5 of the paper: do tasks of one family learn similar routers?

The hard routers of the upstream tasks (w > 0; all layers side by side) are clustered hierarchically (average
linkage, Hamming distance: the share of modules that two tasks use differently), and the tree is cut into as
many clusters as there are task families on the task cards. The adjusted Rand index says how well clusters
and families agree: 0 by chance, 1 for the same partition. Beside it stands what routers that are shuffled
over the tasks give: mean, 95 % quantile, and the share of shuffles that agree at least as well (p).

    python -m benchmarks.paper figure5 [--prompts mini-deep mini-shallow FILE ...] [--router soft]

Writes benchmarks/results/figure5_<kind>.png and figure5.json; takes seconds. The paper (shallow, 38 tasks)
shows the tree and names groups, without a measure. Twins with exchanged labels (``<task>_rotated``, earlier
``_flipped``) are left out: they have the text of their task and another answer, so which family they belong
to is not given. So are tasks whose card is not one of the package.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram, fcluster, linkage

from benchmarks.command import one_line_errors
from benchmarks.provenance import RESULTS, provenance
from mp2.errors import UsageError
from mp2.files import write_json
from mp2.prompts import PromptSet, load_prompts
from mp2.tasks import card_names, load_card

TWINS = ("_rotated", "_flipped")
DISTANCES = {"hard": ("average", "hamming"), "soft": ("ward", "euclidean")}


@dataclass(frozen=True)
class Clustering:
    """Routers of tasks as a tree, cut, and how well the cut agrees with the families."""

    tasks: list[str]
    families: list[str]
    tree: NDArray[np.float64]
    clusters: list[int]
    agreement: float
    shuffled: NDArray[np.float64]  # agreement of each shuffle

    @property
    def p(self) -> float:
        """Share of shuffles (and the routers themselves) that agree at least as well."""
        return float((1 + np.sum(self.shuffled >= self.agreement - 1e-12)) / (1 + len(self.shuffled)))


def routers_of(prompts: PromptSet, weights: str) -> tuple[list[str], NDArray[np.float64]]:
    """Tasks that can be compared, and their routers [n, L' K]: bits, or probabilities if ``soft``."""
    known = set(card_names())
    chosen = [i for i, t in enumerate(prompts.meta.tasks) if not t.endswith(TWINS) and t in known]
    logits = prompts.routers.reshape(len(prompts.meta.tasks), -1)[chosen]
    values = (logits > 0).double() if weights == "hard" else logits.double().sigmoid()
    return [prompts.meta.tasks[i] for i in chosen], values.numpy()


def cluster(
    tasks: list[str],
    families: list[str],
    routers: NDArray[np.float64],
    weights: str,
    *,
    shuffles: int,
    seed: int,
) -> Clustering:
    """Cluster routers [n, L' K] into as many groups as there are families.

    Raises:
        UsageError: fewer than three tasks, or only one family, or one a task.
    """
    n_families = len(set(families))
    if len(tasks) < 3 or not 1 < n_families < len(tasks):
        raise UsageError(
            f"{len(tasks)} tasks of {n_families} families, expected at least 3 tasks of 2 families or more, "
            "and a family with several tasks"
        )
    method, metric = DISTANCES[weights]
    tree = linkage(routers, method=method, metric=metric, optimal_ordering=True)
    clusters = fcluster(tree, n_families, criterion="maxclust")
    rng = np.random.default_rng(seed)
    codes = np.unique(families, return_inverse=True)[1]
    groups = clusters - 1  # fcluster counts from 1
    # shuffled routers give the same tree with its leaves shuffled, so it is enough to shuffle the leaves
    shuffled = [adjusted_rand(codes, rng.permutation(groups)) for _ in range(shuffles)]
    agreement = adjusted_rand(codes, groups)
    return Clustering(tasks, families, tree, [int(c) for c in clusters], agreement, np.array(shuffled))


def adjusted_rand(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Adjusted Rand index of two partitions, codes 0.. [n] each (Hubert and Arabie 1985)."""

    def pairs(counts: NDArray[np.int64]) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    width = int(b.max()) + 1
    both, in_a, in_b = (pairs(np.bincount(x)) for x in (a * width + b, a, b))
    expected = in_a * in_b / (len(a) * (len(a) - 1) / 2)
    most = (in_a + in_b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def draw(found: Clustering, title: str, path: Path) -> None:
    """The tree with task names in their family's colour, and the shuffles' agreement beside it."""
    names = sorted(set(found.families))
    palette = colormaps["tab20"]
    colours = {f: palette((2 * i) % 20 + i // 10) for i, f in enumerate(names)}  # strong ones first
    figure = Figure(figsize=(11, max(4.0, 0.19 * len(found.tasks) + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    tree_axis, null_axis = figure.subplots(1, 2, width_ratios=(3, 1))
    drawn = dendrogram(
        found.tree,
        labels=found.tasks,
        orientation="left",
        ax=tree_axis,
        color_threshold=0,
        above_threshold_color="0.45",
        leaf_font_size=8,
    )
    family_of = dict(zip(found.tasks, found.families, strict=True))
    cluster_of = dict(zip(found.tasks, found.clusters, strict=True))
    tree_axis.set_yticklabels([f"{task}  {cluster_of[task]}" for task in drawn["ivl"]])
    for label, task in zip(tree_axis.get_yticklabels(), drawn["ivl"], strict=True):
        label.set_color(colours[family_of[task]])
    tree_axis.set_xlabel("distance between routers")
    tree_axis.set_title(f"{title}; number: cluster", fontsize=10)
    for side in ("top", "left", "right"):
        tree_axis.spines[side].set_visible(False)
    null_axis.hist(found.shuffled, bins=40, color="0.75")
    null_axis.axvline(found.agreement, color="tab:red")
    null_axis.set_title(
        f"adjusted Rand index {found.agreement:.2f}\nshuffled (grey), p = {found.p:.2g}", fontsize=10
    )
    null_axis.set_yticks([])
    handles = [Patch(color=colours[family], label=family) for family in names]
    null_axis.legend(
        handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def row(name: str, prompts: PromptSet, weights: str, found: Clustering) -> dict[str, Any]:
    """What the JSON says of one prompt file."""
    n_distinct = len({tuple(r) for r in routers_of(prompts, weights)[1].tolist()})
    return {
        "prompts": Path(name).name,
        "prompts_sha256": prompts.sha256,
        "kind": prompts.kind,
        "router": weights,
        "tasks": len(found.tasks),
        "distinct_routers": n_distinct,
        "families": len(set(found.families)),
        "clusters": len(set(found.clusters)),
        "adjusted_rand_index": round(found.agreement, 4),
        "shuffled": {
            "n": len(found.shuffled),
            "mean": round(float(found.shuffled.mean()), 4),
            "quantile_95": round(float(np.quantile(found.shuffled, 0.95)), 4),
            "p": round(found.p, 5),
        },
        "by_task": {
            task: {"family": family, "cluster": number}
            for task, family, number in zip(found.tasks, found.families, found.clusters, strict=True)
        },
    }


@one_line_errors()
def main() -> None:
    """See `run`."""
    run()


def run(words: Sequence[str] | None = None) -> None:
    """Cluster the routers of each prompt file, draw, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", nargs="+", default=["mini-deep", "mini-shallow"])
    parser.add_argument("--router", choices=list(DISTANCES), default="hard", help="soft: sigmoid(w), Ward")
    parser.add_argument("--shuffles", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of figure5.json and the pictures")
    args = parser.parse_args(words)
    rows = []
    for name in args.prompts:
        prompts = load_prompts(name)
        tasks, routers = routers_of(prompts, args.router)
        families = [load_card(task).family for task in tasks]
        found = cluster(tasks, families, routers, args.router, shuffles=args.shuffles, seed=args.seed)
        rows.append(row(name, prompts, args.router, found))
        picture = args.out / f"figure5_{prompts.kind}.png"
        draw(found, f"{args.router} routers of {Path(name).stem}", picture)
        print(_line(rows[-1]), f"  {picture.name}")
    write_json(args.out / "figure5.json", {"provenance": provenance(), "rows": rows})
    print("written:", args.out / "figure5.json")


def _line(found: dict[str, Any]) -> str:
    null = found["shuffled"]
    return (
        f"{found['prompts']}: {found['tasks']} tasks, {found['distinct_routers']} distinct routers, "
        f"{found['clusters']} clusters against {found['families']} families: adjusted Rand index "
        f"{found['adjusted_rand_index']:.3f}; shuffled {null['mean']:.3f}, 95 % quantile "
        f"{null['quantile_95']:.3f}, p = {null['p']:.4f}"
    )


if __name__ == "__main__":
    main()
