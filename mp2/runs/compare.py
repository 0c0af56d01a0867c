"""Several runs side by side: scores, the baselines on the same examples, means over seeds, one picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mp2.errors import UsageError
from mp2.runs.curve import draw_comparison, read_curve
from mp2.runs.head_choice import ASKED_FOR
from mp2.runs.result import read_result
from mp2.runs.series import find_runs

STAGES = {"untuned": "untuned", "stage1": "stage I", "stage2": "stage II"}
_NAMES = {"tfidf": "TF-IDF", "probe": "probe", "nearest": "nearest clause"}
_SETTING = ("method", "head", "backbone")


def read_runs(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[Path]]:
    """The results of runs that have ended, and the folders of those that have not.

    A folder is a run's, or one that has runs in it. Raises ``UsageError`` where there is none.
    """
    found = dict.fromkeys(run_dir for folder in folders for run_dir in find_runs(folder))
    results, open_dirs = [], []
    for run_dir in found:
        if not run_dir.is_dir():
            raise UsageError(f"there is no folder {run_dir}, expected the folder of a run, or one of runs")
        result = read_result(run_dir)
        if result is None:
            open_dirs.append(run_dir)
        else:
            results.append(result | {"run_dir": str(run_dir)})  # where it is now
    return results, open_dirs


def table(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row a run, for several seeds of one setting also their mean and deviation.

    ``--head auto`` is one setting, whatever head it took for a seed: the row of the mean says which, and has
    no loss where they differ, because losses of different heads are not alike.

    Scores are those on :func:`scored_on`'s split. What is the same in all runs is left to :func:`in_common`.
    """
    split = scored_on(results)
    baselines = _baselines(results)
    stages = [stage for stage in STAGES if any(stage in result["stages"] for result in results)]
    setting = [name for name in _SETTING if _differs(results, name)]
    head = ["task", *setting, "seed", "train loss", *baselines.values(), *(STAGES[stage] for stage in stages)]
    rows = []
    for key in dict.fromkeys(_setting(result) for result in results):
        members = sorted((r for r in results if _setting(r) == key), key=lambda r: int(r["seed"]))
        scores = [_scores(result, split, baselines, stages) for result in members]
        losses = [result["train_loss"] for result in members]
        for result, loss, values in zip(members, losses, scores, strict=True):
            cells = [str(_value(result, name)) for name in ("task", *setting)]
            rows.append([*cells, str(result["seed"]), _loss(loss), *map(_score, values)])
        if len(members) > 1:
            kinds = Counter(str(_value(result, "head")) for result in members)
            if len(kinds) > 1:
                cells[1 + setting.index("head")] = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
            loss = None if None in losses or len(kinds) > 1 else mean(losses)
            means = [_mean(column) for column in zip(*scores, strict=True)]
            rows.append([*cells, f"mean of {len(members)}", _loss(loss), *means])
    return head, rows


def in_common(results: Sequence[Mapping[str, Any]]) -> str:
    """What all the runs have in common, and what the scores of :func:`table` are."""
    same = [f"{name} {_value(results[0], name)}" for name in _SETTING if not _differs(results, name)]
    metrics = " or ".join(sorted({result["metric"] for result in results}))
    return ", ".join([f"{scored_on(results)} {metrics}", *same])


def scored_on(results: Sequence[Mapping[str, Any]]) -> str:
    """The split that all runs have scores on."""
    return "test" if all(result["test_score"] is not None for result in results) else "dev"


def draw(path: Path, results: Sequence[Mapping[str, Any]], open_dirs: Sequence[Path] = ()) -> None:
    """Draw the curves of all runs in one picture; level lines where all are of one task and seed.

    Scores are those on dev; where no run has a dev set, the stages' on test, if there is that.
    """
    differs = ["task"] if len({result["task"] for result in results}) > 1 else []
    differs += [name for name in _SETTING if _differs(results, name)]
    names = [
        "  ".join([str(_value(result, name)) for name in differs] or [str(result["task"])])
        for result in results
    ]
    names += [f"{run_dir.name} (not ended)" for run_dir in open_dirs]
    run_dirs = [*(Path(result["run_dir"]) for result in results), *open_dirs]
    found = [read_curve(run_dir) for run_dir in run_dirs]
    split, scores = "dev", [curve.dev for curve in found]
    if results and not any(scores) and scored_on(results) == "test":
        split = "test"
        scores = [[(s["iteration"], s["test_score"]) for s in r["stages"].values()] for r in results]
        scores += [[] for _ in open_dirs]
    curves = [(name, curve.loss, points) for name, curve, points in zip(names, found, scores, strict=True)]
    examples = {(result["task"], result["seed"]) for result in results}
    baselines = (results[0].get("baselines") or {}) if len(examples) == 1 else {}
    metrics = " or ".join(sorted({result["metric"] for result in results})) or "score"
    draw_comparison(path, curves, baselines, split, metrics)


def _setting(result: Mapping[str, Any]) -> tuple[str, ...]:
    head = result.get("head")
    chosen = isinstance(head, Mapping) and head.get("reason") != ASKED_FOR
    values = {name: str(_value(result, name)) for name in _SETTING} | ({"head": "auto"} if chosen else {})
    return (str(result["task"]), *values.values())


def _value(result: Mapping[str, Any], name: str) -> Any:
    value = result.get(name)
    return value["kind"] if name == "head" and isinstance(value, Mapping) else value or "span"


def _differs(results: Sequence[Mapping[str, Any]], name: str) -> bool:
    return len({_value(result, name) for result in results}) > 1


def _baselines(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Keys of baselines that any run has scores of, and their short names."""
    found: dict[str, str] = {}
    for result in results:
        for key, line in (result.get("baselines") or {}).items():
            if line["note"] is None:
                found.setdefault(key, _NAMES.get(key, line["name"].removesuffix(" class")))
    return found


def _scores(
    result: Mapping[str, Any], split: str, baselines: Iterable[str], stages: Iterable[str]
) -> list[float | None]:
    lines = result.get("baselines") or {}
    found = [lines.get(key, {}).get(f"{split}_score") for key in baselines]
    return found + [result["stages"].get(stage, {}).get(f"{split}_score") for stage in stages]


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _score(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


def _mean(scores: Sequence[float | None]) -> str:
    known = [score for score in scores if score is not None]
    whole = len(known) == len(scores)
    return f"{100 * mean(known):.1f} ± {100 * stdev(known):.1f}" if whole else "-"
