"""Points gained by MP2 over BBTv2 against the tokens that the backbone was pre-trained on.

A point is one backbone and deep prompts over it, all made by the same recipes. Its cells are those of Table 3
(deep MP2, BBTv2 as published, BBTv2 with MP2's span head, majority, TF-IDF, a linear probe), in a folder of
its own under --work that is named by the tokens; points of before are kept, so that further ones are added
by the same command. A gain is the mean over tasks of (deep MP2 - BBTv2), paired by seed.

    python -m benchmarks.paper steering --data DIR --point 7.5e6 BACKBONE PROMPTS [--point 3e8 B P ...]
    python -m benchmarks.paper steering --data DIR --table        # the table and the picture of what is there
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.paper.cell_code import code_line, codes, made_by
from benchmarks.paper.cells import Cell, read_cells
from benchmarks.paper.methods import Lab
from benchmarks.paper.options import compute, deadline, parser_of, seeds_of, settings_of
from benchmarks.paper.state import check_failed, nothing_yet, read_settings, state_of
from benchmarks.paper.table3_scores import answers, means, summarise
from mp2.errors import UsageError
from mp2.files import whole_file, write_json

TASKS = ("chnsent", "thucnews", "tnews", "bq", "lcqmc", "cote_mfw")
METHODS = ("majority", "simple", "deep", "bbtv2", "bbtv2-mp2-head")
GAINS = {
    "deep MP2 against BBTv2 as published": "over BBTv2 as published",
    "deep MP2 against BBTv2 with MP2's head": "over BBTv2 with MP2's head",
}


def point_of(words: Sequence[str]) -> tuple[int, str, str]:
    """(tokens, backbone, prompts) of a ``--point``."""
    try:
        tokens = int(float(words[0]))
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise UsageError(f"--point begins with '{words[0]}', expected the tokens of pre-training, as 7.5e6")
    return tokens, words[1], words[2]


def points_in(work: Path) -> list[tuple[int, Path]]:
    """The folders of points that have cells, by tokens."""
    folders = [f for f in work.glob("*/") if f.name.isdecimal() and read_cells(f)]
    return sorted((int(folder.name), folder) for folder in folders)


def rows_of(work: Path) -> list[dict[str, Any]]:
    """A row a point: mean test scores in per cent of each column, the gains, and the scores of its tasks.

    Of the tasks that deep MP2 has at every point: means over other tasks would not compare.
    """
    rows, points = [], points_in(work)
    deep = [{c["task"] for c in read_cells(f) if c["method"] == "deep"} for _, f in points]
    common = set[str]().union(*deep).intersection(*deep)
    for tokens, folder in points:
        scores = summarise([cell for cell in read_cells(folder) if cell["task"] in common])
        found = answers(scores)
        settings = read_settings(folder)
        of_all = means([row for row in scores if row["column"] != "untuned"], None).get("all", {})
        rows.append(
            {
                "tokens": tokens,
                "settings": settings,
                "tasks": of_all.pop("tasks", []),
                "means": {column: round(score, 2) for column, score in of_all.items()},
                "gains": {
                    name: {key: found[question][key] for key in ("gap", "gap_se", "tasks", "better")}
                    for question, name in GAINS.items()
                    if question in found
                },
                "scores": scores,
            }
        )
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Left the scores of every method, right what MP2 gains, over tokens."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for column in dict.fromkeys(column for row in rows for column in row["means"]):
        own = [row for row in rows if column in row["means"]]
        xs, ys = [row["tokens"] for row in own], [row["means"][column] for row in own]
        left.plot(
            xs, ys, marker="o", linestyle="-" if "BBT" in column or "deep" in column else ":", label=column
        )
    for name in GAINS.values():
        own = [row for row in rows if name in row["gains"]]
        gains = [row["gains"][name] for row in own]
        right.errorbar(
            [row["tokens"] for row in own],
            [gain["gap"] for gain in gains],
            yerr=[gain["gap_se"] or 0.0 for gain in gains],
            marker="o",
            capsize=3,
            label=name,
        )
    right.axhline(0, color="grey", linewidth=0.8)
    left.set_ylabel("mean test score")
    right.set_ylabel("points gained by deep MP2")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("tokens of the backbone's pre-training")
        axis.legend(fontsize=7)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a point."""
    columns = list(dict.fromkeys(column for row in rows for column in row["means"]))
    lines = [
        f"| tokens | tasks | {' | '.join(columns)} | {' | '.join(GAINS.values())} |",
        "| ---: | ---: |" + " ---: |" * (len(columns) + len(GAINS)),
    ]
    for row in rows:
        scores = [f"{row['means'][c]:.1f}" if c in row["means"] else "" for c in columns]
        gains = [_gain(row["gains"].get(name)) for name in GAINS.values()]
        lines.append(f"| {row['tokens']:,} | {len(row['tasks'])} | {' | '.join([*scores, *gains])} |")
    return "\n".join(lines)


def _gain(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return ""
    error = "" if gain["gap_se"] is None else f" ± {gain['gap_se']:.1f}"
    return f"{gain['gap']:+.1f}{error} ({gain['better']} of {gain['tasks']})"


def run(words: Sequence[str] | None = None) -> None:
    """Compute the cells of the points named, then the table, the JSON and the picture of all points."""
    parser = parser_of("steering", __doc__, tasks=list(TASKS), methods=list(METHODS), prompts=[], backbone="")
    parser.add_argument(
        "--point", nargs=3, action="append", default=[], metavar=("TOKENS", "BACKBONE", "PROMPTS")
    )
    args = parser.parse_args(words)
    if args.backbone or args.prompts:
        raise UsageError("steering takes backbones and prompts by --point TOKENS BACKBONE PROMPTS")
    until, asked = deadline(args), dict[Path, list[Cell]]()
    for tokens, backbone, prompts in [] if args.table else map(point_of, args.point):
        args.backbone, work = backbone, args.work / str(tokens)
        asked[work] = [Cell(m, t, s) for s in seeds_of(args.seeds) for t in args.tasks for m in args.methods]
        compute(args, Lab(settings_of(args, [prompts]), args.data, work), asked[work], until)
    if args.dry_run:
        return
    rows = rows_of(args.work)
    if not rows and nothing_yet(asked or {args.work: []}, [], until):
        return
    state = []
    for tokens, folder in points_in(args.work):
        scale, *rest = state_of(folder, asked.get(folder, []))
        state += [f"{tokens:,} tokens. {scale}", *rest]
    cells = [cell for _, folder in points_in(args.work) for cell in read_cells(folder)]
    about = {"made_by": made_by(cells), "codes": codes(cells)}
    write_json(args.out, {**about, "rows": rows, "state": state}, indent=1)
    draw(rows, args.out.with_suffix(".png"))
    print(table(rows), "", code_line(cells), "", *state, sep="\n")
    check_failed(asked)
