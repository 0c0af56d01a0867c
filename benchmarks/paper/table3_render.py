"""Table 3's table and answers as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from benchmarks.paper.published import QUOTED, TABLE3, UNSEEN_DATA, UNSEEN_TASK, beside
from benchmarks.paper.table3_scores import TRACKS, Row, columns_of, counts, means


def markdown(
    rows: Sequence[Row],
    found: dict[str, Any],
    settings: dict[str, Any],
    upstream: Collection[str] | None,
    code: str,
) -> str:
    """The table (mean ± sd over seeds, test score in per cent), then the answers, then what was not run.

    Below the tasks the `means`; below the table ``code``, the line that says what made the cells.
    """
    columns = columns_of(rows)
    lines = [f"| task | metric | {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) + 1)]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    track = None
    for task in tasks:
        about = next(row for row in rows if row["task"] == task)
        if about["track"] != track:
            track = about["track"]
            lines.append(f"| *{TRACKS[track]}* |" + " |" * (len(columns) + 1))
        lines.append(f"| {task} | {about['metric']} | {' | '.join(_cell(rows, task, c) for c in columns)} |")
    for name, own in means(rows, upstream).items():
        about = f"mean of {len(own['tasks'])}" + ("" if name == "all" else f" {name}")
        texts = [f"{own[c]:.1f}" if c in own else "" for c in columns]
        lines.append(f"| {about} | | {' | '.join(texts)} |")
    lines += ["", _footnote(rows, settings), "", code, ""]
    if upstream is None:
        lines.append("- which tasks the prompts were pre-trained on is not known: their files are gone")
    for question, answer in found.items():
        if "gap" in answer:
            lines.append(f"- {question}: {_sentence(answer)}")
    for wanted, verdict in found.get("wanted", {}).items():
        lines.append(f"- wanted: {wanted}: {'yes' if verdict['met'] else 'no'} ({verdict['because']})")
    below: dict[str, list[str]] = {}  # tasks -> columns
    for column, tasks_below in found.get("not better than majority", {}).items():
        below.setdefault(", ".join(tasks_below) or "no task", []).append(column)
    lines += [f"- not better than majority on {which}: {', '.join(own)}" for which, own in below.items()]
    refused: dict[tuple[str, str], list[str]] = {}  # task, reason -> columns
    for row in rows:
        if "refused" in row:
            refused.setdefault((row["task"], row["refused"]), []).append(row["column"])
    same: dict[tuple[str, str], list[str]] = {}  # columns, reason -> tasks: what repeats is one line
    for (task, why), own in refused.items():
        same.setdefault((", ".join(own), why), []).append(task)
    lines += [
        f"- {', '.join(which)} {'was' if len(which) == 1 else 'were'} not run by {own}: {why}"
        for (own, why), which in same.items()
    ]
    return "\n".join(lines)


def beside_paper(rows: Sequence[Row]) -> str:
    """The paper's numbers, ours (mean ± sd) and the difference: three lines a method, a column a task.

    CPM-2 is quoted from the paper; what the paper has no line for is left out.
    """
    ours = {(row["column"], row["task"]): row for row in rows if "mean" in row}
    tasks = [t for t in (*UNSEEN_DATA, *UNSEEN_TASK) if any(task == t for _, task in ours)]
    if not tasks:
        return "None of these tasks is in the paper."
    lines = [f"| method | whose | {' | '.join(tasks)} |", "| --- | --- |" + " ---: |" * len(tasks)]
    for column, theirs in TABLE3.items():
        if column not in QUOTED and not any((column, task) in ours for task in tasks):
            continue
        found = [ours.get((column, task)) for task in tasks]
        texts = [
            beside(theirs.get(task), *((None, None) if row is None else (row["mean"], row["sd"], row["n"])))
            for task, row in zip(tasks, found, strict=True)
        ]
        papers, own, differences = zip(*texts, strict=True)
        lines.append(f"| {column} | paper | {' | '.join(papers)} |")
        if column not in QUOTED:
            lines.append(f"| | ours | {' | '.join(own)} |")
            lines.append(f"| | difference | {' | '.join(differences)} |")
    return "\n".join(lines)


def _sentence(answer: dict[str, Any]) -> str:
    error = "" if answer["gap_se"] is None else f" ± {answer['gap_se']:.1f}"
    clear = (
        f"; beyond two standard errors: better on {answer['clear_better']}, worse on {answer['clear_worse']} "
        f"of {answer['paired']}"
        if answer["paired"]
        else ""
    )
    return (
        f"{counts(answer)}, within 2 points on {answer['within_2']}, "
        f"mean gap {answer['gap']:+.1f}{error} points{clear}"
    )


def _footnote(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    seeds_of = sorted({row["n"] for row in rows if "n" in row})
    seeds = f"{seeds_of[0]}" if len(seeds_of) == 1 else f"{seeds_of[0]} to {seeds_of[-1]}"
    seeds += " seed" if seeds == "1" else " seeds"
    return (
        f"Test score, mean ± standard deviation over {seeds}; the first {settings['test_limit']} test "
        f"examples; backbone {settings['backbone']}; {settings['iters']} iterations (black-box), "
        f"{settings['epochs']} epochs (gradient); at most {settings['max_tokens']} tokens. Majority: the "
        "test set's most frequent label or option; in extraction tasks the whole context as the answer. What "
        'says "scratch" or "MP2\'s head" has the span head of the pre-trained prompts.'
    )


def _cell(rows: Sequence[Row], task: str, column: str) -> str:
    row = next((r for r in rows if r["task"] == task and r["column"] == column), None)
    if row is None:
        return ""
    if "refused" in row:
        return "not run"
    return (
        f"{row['mean']:.1f}"
        if row["n"] == 1 or column == "majority"
        else f"{row['mean']:.1f} ± {row['sd']:.1f}"
    )
