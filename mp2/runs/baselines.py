"""The baselines of a task as ``mp2 baselines`` prints them and every run stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mp2.tasks.baselines import Baseline

if TYPE_CHECKING:
    from mp2.runs.config import BbtConfig
    from mp2.runs.few_shot_problem import FewShotProblem


def task_baselines(config: BbtConfig, *, probe: bool = True) -> dict[str, Any]:
    """Return the baselines on the few-shot split that ``mp2 bbt`` draws with the same config.

    With ``probe`` the config's backbone is loaded and probed. Raises ``UsageError`` for what ``mp2 bbt``
    refuses of the data.
    """
    from mp2.backbone import load_backbone
    from mp2.runs.pooled_states import pooled_states
    from mp2.tasks import few_shot_split, has_split, load_card, load_examples
    from mp2.tasks.baselines import baselines
    from mp2.tasks.record import parse_fields

    card, data = load_card(config.task), config.data
    names = parse_fields(config.field, card)
    there = {split for split in ("dev", "test") if has_split(card, split, data)}
    select = config.dev == "auto"
    split = few_shot_split(
        card,
        load_examples(card, "train", data, fields=names),
        config.seed,
        config.shots,
        dev_examples=load_examples(card, "dev", data, fields=names) if select and "dev" in there else (),
        select=select,
    )
    test = load_examples(card, "test", data, config.test_limit, names) if "test" in there else []
    states = None
    if probe:
        backbone = load_backbone(config.backbone, revision=config.revision)
        states = pooled_states(backbone, config.max_tokens or backbone.config.max_positions)
    lines = baselines(card, split.train, {"dev": split.dev, "test": test}, states)
    return {
        "task": card.task,
        "metric": card.metric,
        "seed": config.seed,
        "backbone": config.backbone if probe else None,
        "examples": {"train": len(split.train), "dev": len(split.dev), "test": len(test)},
        "baselines": {line.key: line.as_dict() for line in lines},
        "remarks": list(split.remarks),
    }


def baseline_facts(
    problem: FewShotProblem, dev_score: float | None, test_score: float | None, longer: str = "--iters"
) -> dict[str, Any]:
    """Return what ``result.json`` has of the baselines, and of the selected prompt beside them.

    ``verdict`` says in words that the prompt is no better than one of them, and what to try (``longer`` is
    the option that lets the run go on); None where it is better than all.
    Both are None with ``--no-baselines``, and where no dev or test example is there to be scored.
    """
    from mp2.tasks.baselines import baselines, verdict

    config, split = problem.config, problem.split
    scored = {"dev": split.dev, "test": problem.data.tests if config.test else []}
    if not config.baselines or not any(scored.values()):
        return {"baselines": None, "verdict": None}
    lines = baselines(problem.card, split.train, scored, problem.data.states)
    where, found = ("test", test_score) if test_score is not None else ("dev", dev_score)
    other_head = problem.card.type == "classification" and problem.head.kind == "span"
    first = "'mp2 bbt --head ridge', " if other_head else ""
    said = None if found is None else verdict(problem.card.metric, where, found, lines, first, longer)
    return {"baselines": {line.key: line.as_dict() for line in lines}, "verdict": said}


def read_baselines(stored: dict[str, dict[str, Any]]) -> list[Baseline]:
    """Return the lines of a ``result.json``."""
    return [
        Baseline(
            key,
            line["name"],
            {s: line[f"{s}_score"] for s in ("dev", "test") if line[f"{s}_score"] is not None},
            line["note"],
        )
        for key, line in stored.items()
    ]


def baseline_rows(lines: Sequence[Baseline]) -> list[tuple[str, str, str]]:
    """Return (name, dev, test) of each line as a table shows it; the reason in the place of scores."""
    rows = []
    for line in lines:
        if line.note is not None:
            rows.append((f"{line.name}: none, {line.note}", "", ""))
            continue
        dev, test = (f"{100 * line.scores[s]:.1f}" if s in line.scores else "-" for s in ("dev", "test"))
        rows.append((line.name, dev, test))
    return rows
