"""The paper's own numbers (Sun et al., ACL 2023 Findings): Tables 3 and 5, mean and standard deviation.

Figures 3 and 4 are pictures, without numbers. Table 4 is in ``benchmarks/speed/table4_render.py``.
CPM-2 (11B) is quoted by the paper from PPT (Gu et al. 2022), and here from the paper.
"""

from __future__ import annotations

UNSEEN_DATA = ("amazon", "thucnews", "bq", "cmnli", "cmrc2018", "ccpm", "cote_mfw")
UNSEEN_TASK = ("chnsent", "tnews", "ocnli", "lcqmc", "drcd", "c3", "cote_bd")
# a line a method: mean and deviation of each task, "-" where the paper has none
_DATA = """
CPM-2 model tuning | 42.5 2.0 - 40.7 1.0 - - 81.8 1.6 -
CPM-2 prompt tuning | 30.3 4.8 - 35.4 0.5 - - 31.0 9.7 -
CPM-2 PPT | 44.6 1.1 - 40.6 0.4 - - 83.4 0.9 -
model tuning | 47.3 5.3 93.5 0.3 57.3 1.7 34.7 0.1 37.5 7.4 76.1 2.4 81.7 1.3
prompt tuning | 32.9 2.4 68.6 4.2 51.3 0.7 33.8 0.4 3.5 0.4 27.3 1.9 57.7 1.0
P-tuning v2 | 47.7 2.3 90.4 0.6 54.6 1.6 34.5 0.2 34.4 10.4 76.3 2.0 81.8 2.0
PPT | 49.7 2.3 87.9 1.3 53.3 0.9 34.2 0.6 6.1 0.6 83.1 1.2 74.0 4.1
SPoT | 55.2 2.9 89.4 0.9 61.1 1.5 39.0 0.5 56.6 1.7 85.2 0.5 86.5 0.7
gradient shallow | 62.3 1.0 91.2 1.6 71.8 2.0 66.5 2.3 68.6 2.3 85.3 1.8 87.4 1.2
gradient | 65.3 1.7 95.2 0.2 81.4 1.3 76.3 0.8 82.8 1.0 92.4 0.3 90.5 0.2
BBT | 44.5 1.5 49.2 6.0 51.7 0.5 35.4 0.7 - 26.4 0.5 -
BBTv2 | 47.7 1.7 84.0 0.8 53.5 0.8 37.8 0.4 - 26.9 1.5 -
shallow | 58.5 5.1 92.4 0.4 75.2 0.8 66.4 1.4 75.6 1.9 90.6 0.2 88.1 1.1
shallow router-only | 62.5 3.9 92.6 0.5 75.6 0.8 63.4 3.3 77.7 0.6 90.3 0.7 89.2 0.6
deep | 66.0 1.0 94.6 0.2 80.9 0.8 76.3 2.1 83.9 0.8 92.4 0.7 90.1 0.2
deep router-only | 66.1 0.5 94.6 0.2 80.9 0.8 74.2 2.2 84.0 0.9 91.8 0.7 90.2 0.2
"""
_TASK = """
CPM-2 model tuning | 86.1 1.8 - 38.5 1.5 58.8 1.8 - 38.4 3.7 -
CPM-2 prompt tuning | 62.1 3.1 - 37.0 0.5 51.5 3.4 - 28.2 0.4 -
CPM-2 PPT | 90.7 0.2 - 41.5 1.5 55.0 0.4 - 50.2 0.6 -
model tuning | 76.8 2.9 47.8 0.8 35.6 1.6 55.3 2.1 29.0 9.7 30.0 2.5 85.2 1.4
prompt tuning | 60.6 2.9 27.0 0.9 33.0 1.8 49.2 2.6 2.9 0.2 25.5 0.8 61.9 1.2
P-tuning v2 | 75.9 2.3 46.9 0.8 33.7 0.2 49.7 2.2 17.8 7.9 28.0 3.7 86.2 2.1
PPT | 64.1 3.4 44.8 0.9 34.2 0.7 51.4 2.1 5.0 1.4 36.8 2.4 77.5 1.0
SPoT | 87.0 0.9 48.2 1.2 38.7 1.0 60.9 2.1 57.8 1.2 44.9 0.8 88.1 0.3
gradient shallow | 90.5 0.2 51.4 1.1 53.4 5.0 72.5 1.9 67.2 3.0 44.1 1.6 88.8 0.7
gradient | 92.0 0.1 54.7 0.3 64.1 2.3 83.5 1.0 80.6 0.9 35.4 0.9 91.8 0.3
BBT | 84.7 1.7 35.5 1.7 32.6 0.4 50.7 4.0 - 28.7 1.1 -
BBTv2 | 85.8 0.8 47.2 1.2 36.0 1.0 56.6 2.2 - 29.3 0.4 -
shallow | 90.2 0.4 52.4 1.0 54.0 2.7 77.1 1.8 73.4 1.1 42.7 0.9 89.7 0.4
shallow router-only | 90.4 0.3 49.9 3.2 53.3 3.8 72.6 0.9 71.5 0.8 43.7 2.1 88.3 0.9
deep | 91.7 0.4 55.1 0.9 65.7 1.9 84.6 0.9 79.2 0.8 36.0 0.5 91.5 0.2
deep router-only | 91.7 0.4 54.3 0.7 65.3 2.3 83.4 1.7 79.8 1.2 36.8 0.9 91.6 0.1
"""
Score = tuple[float, float]


def _read(text: str, tasks: tuple[str, ...]) -> dict[str, dict[str, Score]]:
    found: dict[str, dict[str, Score]] = {}
    for line in text.strip().splitlines():
        name, _, numbers = line.partition(" | ")
        words, scores = iter(numbers.split()), {}
        for task in tasks:
            word = next(words)
            if word != "-":
                scores[task] = float(word), float(next(words))
        assert next(words, None) is None, line
        found[name] = scores
    return found


_UNSEEN_TASK = _read(_TASK, UNSEEN_TASK)
TABLE3: dict[str, dict[str, Score]] = {
    name: scores | _UNSEEN_TASK[name] for name, scores in _read(_DATA, UNSEEN_DATA).items()
}
"""Column of our table -> task -> mean and deviation."""

QUOTED = ("CPM-2 model tuning", "CPM-2 prompt tuning", "CPM-2 PPT")
"""What we do not run: 11 billion parameters."""

TABLE5_TASKS = ("chnsent", "tnews", "lcqmc", "drcd")
TABLE5: dict[tuple[str, str], dict[str, Score]] = {
    (kind, with_it): dict(zip(TABLE5_TASKS, scores, strict=True))
    for kind, with_it, scores in (
        ("shallow", "w/o", ((90.46, 0.16), (51.36, 1.12), (72.50, 1.92), (67.20, 2.96))),
        ("shallow", "w/", ((89.36, 0.63), (51.36, 1.30), (70.42, 1.27), (58.96, 0.73))),
        ("deep", "w/o", ((91.61, 0.18), (55.23, 0.29), (82.30, 1.28), (78.69, 0.72))),
        ("deep", "w/", ((92.02, 0.11), (54.71, 0.31), (83.45, 1.00), (80.64, 0.87))),
    )
}
"""Fast and slow learning: with it, or one rate for routers and prompts."""


def beside(paper: Score | None, mean: float | None, sd: float | None, n: int = 0) -> tuple[str, str, str]:
    """(paper, ours +- sd, difference) as texts; empty where there is none."""
    theirs = "" if paper is None else f"{paper[0]:.1f}"
    if mean is None:
        return theirs, "", ""
    ours = f"{mean:.1f}" if n < 2 or sd is None else f"{mean:.1f} ± {sd:.1f}"
    return theirs, ours, "" if paper is None else f"{mean - paper[0]:+.1f}"
