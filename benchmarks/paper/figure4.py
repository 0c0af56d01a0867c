"""Figure 4 of the paper: (a) 10 to 30 labels of IFLYTEK, (b) 32 to 256 examples of LCQMC; MP2 and PPT.

(a) Labels with enough examples for train and dev (8 each) and at least one in test are put in a random order
(seed 0), and the first 10, 15, 20, 25 and 30 of it are the tasks: each has those of the one before. (b) Half
of the examples for each of the two labels. Black-box MP2, deep and shallow, and PPT by gradient. The paper
has a picture only, without numbers.

    python -m benchmarks.paper figure4a --data DIR [--backbone B] --prompts DEEP SHALLOW PPT
    python -m benchmarks.paper figure4b --data DIR [--backbone B] --prompts DEEP SHALLOW PPT
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.paper.cell_code import code_line, codes, made_by
from benchmarks.paper.cells import Cell, read_cells
from benchmarks.paper.methods import Lab
from benchmarks.paper.options import choose, compute, deadline, parser_of, seeds_of, settings_of
from benchmarks.paper.published import beside
from benchmarks.paper.state import check_failed, nothing_yet, state_of
from benchmarks.paper.table3_scores import read_score
from mp2.errors import UsageError
from mp2.files import whole_file, write_json, write_text
from mp2.tasks import load_card

LABELS = (10, 15, 20, 25, 30)
EXAMPLES = (32, 64, 128, 256)
SHOTS = 8  # of train, and of dev, a label
METHODS = ("deep", "shallow", "ppt")
NAMES = {"deep": "Deep MP2", "shallow": "Shallow MP2", "ppt": "PPT"}


def label_subsets(data: Path, out: Path, sizes: Sequence[int]) -> dict[int, Path]:
    """Write ``iflytek_N.toml`` and ``data/iflytek_N`` under ``out`` for each size N; N -> the card.

    Raises:
        UsageError: no iflytek, or fewer of its labels have enough examples than the largest size.
    """
    card = load_card("iflytek")
    absent = [path for path in _sources(data).values() if not path.is_file()]
    if absent:
        raise UsageError(f"there is no {absent[0]}: --data needs iflytek/train.jsonl and test.jsonl")
    lines = {split: path.read_text("utf-8").splitlines() for split, path in _sources(data).items()}
    labels = {split: [str(json.loads(line)["label"]) for line in own] for split, own in lines.items()}
    counts = Counter(labels["train"])
    enough = [n for n in card.labels if counts[n] >= 2 * SHOTS and n in set(labels["test"])]
    if len(enough) < max(sizes):
        raise UsageError(f"{len(enough)} labels of iflytek have {2 * SHOTS} examples, expected {max(sizes)}")
    order = [enough[i] for i in np.random.default_rng(0).permutation(len(enough))]
    cards = {}
    for size in sizes:
        chosen, name = set(order[:size]), f"iflytek_{size}"
        folder = out / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, own in lines.items():
            kept = [line for line, label in zip(own, labels[split], strict=True) if label in chosen]
            write_text(folder / f"{split}.jsonl", "\n".join(kept) + "\n")  # whole: others may read it
        cards[size] = card_file(out, size)
        words = "".join(
            f"{json.dumps(label, ensure_ascii=False)} = {json.dumps(word, ensure_ascii=False)}\n"
            for label, word in card.labels.items()
            if label in chosen
        )
        text = re.split(r"^\[", card.path.read_text("utf-8"), maxsplit=1, flags=re.MULTILINE)[0]
        text = re.sub(r"^task = .*$", f'task = "{name}"', text, flags=re.MULTILINE)
        write_text(cards[size], f"{text}[labels]\n{words}")
    return cards


def _sources(data: Path) -> dict[str, Path]:
    return {split: data / "iflytek" / f"{split}.jsonl" for split in ("train", "test")}


def card_file(work: Path, size: int) -> Path:
    """Where the card of so many labels lies."""
    return work / f"iflytek_{size}.toml"


def rows_of(cells: Sequence[dict[str, Any]], x_of: Any) -> list[dict[str, Any]]:
    """A row a method and place on the x axis: mean and deviation of the test score in per cent."""
    places: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        if "refused" not in cell:
            score = 100 * read_score(cell["stages"], "final")
            places.setdefault((cell["method"], x_of(cell)), []).append(score)
    return [
        {
            "method": method,
            "x": x,
            "mean": round(mean(found), 2),
            "sd": round(stdev(found), 2) if len(found) > 1 else 0.0,
            "n": len(found),
        }
        for (method, x), found in sorted(places.items())
    ]


def draw(rows: Sequence[dict[str, Any]], x_label: str, path: Path) -> None:
    """A line a method, with error bars; places that double (Figure 4b) stand at equal distances."""
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if own:
            xs, means, sds = ([row[key] for row in own] for key in ("x", "mean", "sd"))
            axis.errorbar(xs, means, yerr=sds, marker="o", capsize=3, label=NAMES[method])
    places = sorted({row["x"] for row in rows})
    if len(places) > 1 and all(b == 2 * a for a, b in itertools.pairwise(places)):
        axis.set_xscale("log", base=2)
    axis.set_xticks(places, [str(place) for place in places])
    axis.set_xlabel(x_label)
    axis.set_ylabel("accuracy")
    axis.legend()
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})


def table(rows: Sequence[dict[str, Any]], x_label: str) -> str:
    """Markdown: a line a method, a column a place."""
    xs = sorted({row["x"] for row in rows})
    lines = [f"| {x_label} | {' | '.join(map(str, xs))} |", "| --- |" + " ---: |" * len(xs)]
    for method in METHODS:
        own = {row["x"]: row for row in rows if row["method"] == method}
        if own:
            found = [own.get(x, {"mean": None, "sd": None, "n": 0}) for x in xs]
            cells = [beside(None, one["mean"], one["sd"], one["n"])[1] for one in found]
            lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_a(words: Sequence[str] | None = None) -> None:
    """Figure 4a."""
    parser = parser_of("figure4a", __doc__)
    parser.add_argument("--labels", nargs="+", type=int, default=list(LABELS))
    args = parser.parse_args(words)
    if args.tasks is not None:
        raise UsageError("the tasks of figure4a are subsets of iflytek: drop --tasks, give --labels")
    until, lab = deadline(args), None
    if not args.table:
        label_subsets(args.data, args.work, args.labels)
        lab = Lab(settings_of(args), args.work / "data", args.work)
    args.tasks = [str(card_file(args.work, size)) for size in args.labels]
    notes = choose(args, (), METHODS, lab)
    asked = [
        Cell(m, task, seed) for seed in seeds_of(args.seeds) for task in args.tasks for m in args.methods
    ]
    if lab is not None:
        compute(args, lab, asked, until)
    if args.dry_run:
        return
    _write(args, asked, notes, until, "number of labels", lambda cell: int(cell["task"].rpartition("_")[2]))


def run_b(words: Sequence[str] | None = None) -> None:
    """Figure 4b."""
    parser = parser_of("figure4b", __doc__)
    parser.add_argument("--examples", nargs="+", type=int, default=list(EXAMPLES))
    args = parser.parse_args(words)
    until, lab = deadline(args), None if args.table else Lab(settings_of(args), args.data, args.work)
    notes = choose(args, ("lcqmc",), METHODS, lab)
    n_labels = {load_card(task).task: len(load_card(task).labels) for task in args.tasks}
    asked = [
        Cell(method, task, seed, n // n_labels[load_card(task).task])
        for seed in seeds_of(args.seeds)
        for task in args.tasks
        for n in args.examples
        for method in args.methods
    ]
    if lab is not None:
        compute(args, lab, asked, until)
    if args.dry_run:
        return
    _write(
        args,
        asked,
        notes,
        until,
        "number of training samples",
        lambda cell: cell["shots"] * n_labels[cell["task"]],
    )


def _write(
    args: Any, asked: Sequence[Cell], notes: Sequence[str], until: float, x_label: str, x_of: Any
) -> None:
    cells = read_cells(args.work)
    rows = rows_of(cells, x_of)
    if not rows and nothing_yet({args.work: asked}, cells, until):
        return
    state = state_of(args.work, asked, notes)
    about = {"made_by": made_by(cells), "codes": codes(cells), "x": x_label}
    write_json(args.out, {**about, "rows": rows, "state": state}, indent=1)
    draw(rows, x_label, args.out.with_suffix(".png"))
    print(table(rows, x_label), "", code_line(cells), "", *state, sep="\n")
    check_failed({args.work: asked})
