"""From the cells of Table 3 to its table and to the answers that it gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]

COLUMNS = {  # column -> (method of the cell, how its score is read)
    "majority": ("majority", "final"),
    "TF-IDF": ("simple", "tfidf"),
    "linear probe": ("simple", "probe"),
    "model tuning": ("model-tuning", "final"),
    "prompt tuning": ("prompt-tuning", "final"),
    "P-tuning v2": ("p-tuning-v2", "final"),
    "PPT": ("ppt", "final"),
    "SPoT": ("spot", "final"),
    "gradient shallow": ("gradient-shallow", "final"),
    "gradient": ("gradient", "final"),
    "BBT": ("bbt", "final"),
    "BBTv2": ("bbtv2", "final"),
    "untuned": ("deep", "untuned"),
    "BBT, MP2's head": ("bbt-mp2-head", "final"),
    "BBT, upstream head": ("bbt-upstream-head", "final"),
    "BBT, tuned head": ("bbt-tuned-head", "final"),
    "BBTv2, MP2's head": ("bbtv2-mp2-head", "final"),
    "BBTv2, upstream head": ("bbtv2-upstream-head", "final"),
    "BBTv2, tuned head": ("bbtv2-tuned-head", "final"),
    "shallow router-only": ("shallow", "router"),
    "shallow": ("shallow", "final"),
    "deep router-only": ("deep", "router"),
    "deep": ("deep", "final"),
    "deep, by sum": ("deep-sum", "final"),
    "shallow, by sum": ("shallow-sum", "final"),
    "gradient, soft": ("gradient-soft", "final"),
    "gradient, by sum": ("gradient-sum", "final"),
    "deep, inline": ("deep-inline", "final"),
    "BBTv2, MP2's head, inline": ("bbtv2-inline", "final"),
    "gradient, inline": ("gradient-inline", "final"),
    "scratch, untuned": ("gradient-scratch", "untuned"),
    "scratch inline, untuned": ("gradient-scratch-inline", "untuned"),
    "gradient, scratch": ("gradient-scratch", "final"),
    "gradient, scratch inline": ("gradient-scratch-inline", "final"),
}
QUESTIONS: dict[str, tuple[str, str]] = {
    "deep MP2 against BBTv2 as published": ("deep", "BBTv2"),
    "shallow MP2 against BBT as published": ("shallow", "BBT"),
    "deep MP2 against BBTv2 with MP2's head": ("deep", "BBTv2, MP2's head"),
    "deep MP2 against BBTv2 with a head trained upstream": ("deep", "BBTv2, upstream head"),
    "deep MP2 against BBTv2 with a head tuned on the examples": ("deep", "BBTv2, tuned head"),
    "shallow MP2 against BBT with MP2's head": ("shallow", "BBT, MP2's head"),
    "deep MP2 by gradient against SPoT": ("gradient", "SPoT"),
    "shallow MP2 by gradient against SPoT": ("gradient shallow", "SPoT"),
    "SPoT against PPT": ("SPoT", "PPT"),
    "deep MP2 by gradient against model tuning": ("gradient", "model tuning"),
    "deep MP2 against untuned": ("deep", "untuned"),
    "deep router-only against two-stage": ("deep router-only", "deep"),
    "shallow router-only against two-stage": ("shallow router-only", "shallow"),
    "deep against shallow": ("deep", "shallow"),
    "gradient against black-box, deep": ("gradient", "deep"),
    "MP2 against prompts from scratch, both by gradient": ("gradient", "gradient, scratch"),
    "prefix against inline, pre-trained, by gradient": ("gradient", "gradient, inline"),
    "prefix against inline, from scratch, before any tuning": ("scratch, untuned", "scratch inline, untuned"),
    "prefix against inline, from scratch, by gradient": ("gradient, scratch", "gradient, scratch inline"),
    "prefix against inline, pre-trained, black-box": ("deep", "deep, inline"),
    "prefix against inline, from scratch, black-box": ("BBTv2, MP2's head", "BBTv2, MP2's head, inline"),
    "division by the sum against by K, deep": ("deep, by sum", "deep"),
    "division by the sum against by K, shallow": ("shallow, by sum", "shallow"),
    "division by the sum against by K, gradient": ("gradient, by sum", "gradient"),
    "soft against hard router at inference, gradient": ("gradient, soft", "gradient"),
}
TRACKS = {
    "unseen_data": "unseen data",
    "unseen_task": "unseen task",
    "extra": "extra",
    "upstream": "upstream",
}


def read_score(stages: dict[str, Any], what: str) -> float:
    """A test score of a run: ``untuned``, ``router`` (what router-only would have returned) or ``final``."""
    if what == "router":  # the better of untuned and stage I by dev, ties to the lower loss, then the earlier
        best = max(("untuned", "stage1"), key=lambda s: (stages[s]["dev_score"], -_loss(stages[s])))
        return float(stages[best]["test_score"])
    if what in ("untuned", "tfidf", "probe"):
        return float(stages[what]["test_score"])
    return float(list(stages.values())[-1]["test_score"])


def _loss(stage: dict[str, Any]) -> float:
    return math.inf if stage["dev_loss"] is None else float(stage["dev_loss"])


def summarise(cells: Sequence[dict[str, Any]]) -> list[Row]:
    """A row a task and column: scores by seed, mean and standard deviation (n - 1), in per cent."""
    rows = []
    tracks = {cell["task"]: list(TRACKS).index(cell["track"]) for cell in cells}
    for task in sorted(tracks, key=lambda t: (tracks[t], t)):
        for column, (method, what) in COLUMNS.items():
            found = [c for c in cells if c["task"] == task and c["method"] == method]
            if what in ("tfidf", "probe"):  # not every task has them
                found = [c for c in found if what in c.get("stages", {})]
            if not found:
                continue
            about = {key: found[0][key] for key in ("track", "metric")}
            row: Row = {"task": task, **about, "column": column}
            refused = [c["refused"] for c in found if "refused" in c]
            if refused:
                rows.append(row | {"refused": refused[0]})
                continue
            scores = {
                str(c["seed"]): 100 * read_score(c["stages"], what)
                for c in sorted(found, key=lambda c: int(c["seed"]))
            }
            values = list(scores.values())
            spread = stdev(values) if len(values) > 1 else 0.0
            rows.append(row | {"mean": mean(values), "sd": spread, "n": len(values), "by_seed": scores})
    return rows


def answers(rows: Sequence[Row]) -> dict[str, Any]:
    """What the table was made for; every comparison over the tasks where both columns have scores.

    ``gap`` is the mean over tasks of (first - second), points, paired by seed: seeds that only one of them
    has are left out. A task's standard error is that of its mean difference over seeds (sd / sqrt(n), n - 1
    in the sd; none with one seed); ``clear_better`` and ``clear_worse`` count the tasks, of the ``paired``
    that have one, whose difference exceeds two of them. ``gap_se`` is the gap's own. Seeds vary the
    few-shot examples and the search; the noise of the test examples is in none of these. With n seeds two
    standard errors are a t of n - 1 degrees of freedom: p = 0.30 for 2 seeds, 0.12 for 5.
    """
    found: dict[str, Any] = {}
    for question, (first, second) in QUESTIONS.items():
        differences = _differences(rows, first, second)
        if differences:
            found[question] = _compare(differences)
    below = {}
    for column in COLUMNS:
        gaps = {task: mean(d) for task, d in _differences(rows, column, "majority").items()}
        if column != "majority" and gaps:
            below[column] = [task for task, gap in gaps.items() if gap <= 0]
    if below:
        found["not better than majority"] = below
    wanted = _wanted(found)
    if wanted:
        found["wanted"] = wanted
    return found


def _compare(differences: dict[str, list[float]]) -> dict[str, Any]:
    gaps = {task: mean(values) for task, values in differences.items()}
    errors = {
        task: stdev(values) / math.sqrt(len(values))
        for task, values in differences.items()
        if len(values) > 1
    }
    values = list(gaps.values())
    return {
        "tasks": len(values),
        "better": sum(v > 0 for v in values),
        "within_2": sum(abs(v) <= 2 for v in values),
        "gap": round(mean(values), 2),
        "gap_se": (
            round(math.sqrt(sum(e * e for e in errors.values())) / len(gaps), 2)
            if len(errors) == len(gaps)
            else None
        ),
        "paired": len(errors),
        "clear_better": sum(gaps[task] > 2 * error for task, error in errors.items()),
        "clear_worse": sum(-gaps[task] > 2 * error for task, error in errors.items()),
        "by_task": {task: round(v, 2) for task, v in gaps.items()},
        "se_by_task": {task: round(e, 2) for task, e in errors.items()},
    }


def _wanted(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What MP2 was to show here, and whether it does: of 12 tasks, or 10 / 12 of those there are."""
    verdicts: dict[str, dict[str, Any]] = {}
    against = found.get("deep MP2 against BBTv2 as published")
    if against:
        name = "deep two-stage at least 10 points above BBTv2 as published, better on 10 of 12 tasks"
        met = against["gap"] >= 10 and against["better"] * 12 >= against["tasks"] * 10
        verdicts[name] = {"met": met, "because": f"{against['gap']:+.1f} points, {counts(against)}"}
    router = found.get("deep router-only against two-stage")
    if router:
        name = "deep router-only within 2 points of two-stage"
        verdicts[name] = {"met": router["gap"] >= -2, "because": f"{router['gap']:+.1f} points"}
    if "deep" in found.get("not better than majority", {}):
        below = {c: len(tasks) for c, tasks in found["not better than majority"].items() if tasks}
        below = {column: n for column, n in below.items() if "untuned" not in column}
        because = ", ".join(f"{column}: not on {n}" for column, n in below.items())
        verdicts["all but untuned better than majority"] = {
            "met": not below,
            "because": because or "no exception",
        }
    return verdicts


def counts(answer: dict[str, Any]) -> str:
    """On how many tasks the first was better."""
    return f"better on {answer['better']} of {answer['tasks']} tasks"


def _differences(rows: Sequence[Row], first: str, second: str) -> dict[str, list[float]]:
    """(first - second) at each common seed for each task; majority is the same for every seed."""
    scores = {(r["task"], r["column"]): r["by_seed"] for r in rows if "by_seed" in r}
    differences = {}
    for task in dict.fromkeys(r["task"] for r in rows):
        a, b = scores.get((task, first)), scores.get((task, second))
        if a is None or b is None:
            continue
        if second == "majority":
            differences[task] = [value - mean(b.values()) for value in a.values()]
        elif common := [seed for seed in a if seed in b]:
            differences[task] = [a[seed] - b[seed] for seed in common]
    return differences


def means(rows: Sequence[Row], upstream: Collection[str] | None) -> dict[str, dict[str, Any]]:
    """Columns' means over the tasks where all of them have scores, and over those in ``upstream`` and not.

    ``upstream`` are the tasks that the prompts were pre-trained on; None: not known. Columns with fewer than
    half as many tasks as the fullest have no mean: one that was just begun would leave nothing of the others.
    """
    scored = Counter(row["column"] for row in rows if "mean" in row)
    columns = [c for c in columns_of(rows) if 2 * scored[c] >= max(scored.values(), default=0)]
    tasks = [
        task
        for task in dict.fromkeys(row["task"] for row in rows)
        if all(_mean(rows, task, column) is not None for column in columns)
    ]
    groups = {"all": tasks}
    if upstream is not None:
        groups["pre-trained on"] = [task for task in tasks if task in upstream]
        groups["not pre-trained on"] = [task for task in tasks if task not in upstream]
    return {
        name: {"tasks": own, **{c: mean(_mean(rows, task, c) or 0.0 for task in own) for c in columns}}
        for name, own in groups.items()
        if own
    }


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns that have a row, in their order."""
    return [column for column in COLUMNS if any(r["column"] == column for r in rows)]


def _mean(rows: Sequence[Row], task: str, column: str) -> float | None:
    found = [r["mean"] for r in rows if r["task"] == task and r["column"] == column and "mean" in r]
    return float(found[0]) if found else None
