"""Evaluation through the journal: recorded losses and scores are replayed, new ones computed and journaled.

The driver asks for everything through a :class:`Recorder`, in the same order in a fresh and in a resumed
run. While there are recorded events, they are handed back and nothing is computed; each carries a hash of
its candidates, so that a replay which does not follow the recorded run is noticed at the first candidate
that differs.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mp2.engine.forward import Pending
from mp2.errors import LossError, MismatchError
from mp2.optimizers.two_stage import Scores
from mp2.runs.journal import Journal, Record, finite_or_none

Floats = NDArray[np.float64]
T = TypeVar("T")
Evaluate = Callable[[Callable[[], Any]], tuple[Any, float]]  # also of a computation that is only launched
SECONDS = ("forward", "suggest", "journal", "other")  # of losses; each event's, as ``<name>_s``


def timed(compute: Callable[[], Pending[T]]) -> tuple[T, float]:
    """The result of ``compute``, fetched where it was only launched, and the seconds that it took."""
    start = time.perf_counter()
    value = compute().fetch()
    return value, time.perf_counter() - start


class NonFiniteLossWarning(UserWarning):
    """Some candidates of a generation had NaN or infinite losses."""


ComputeScores = Callable[[], Pending[Scores]]


class Recorder:
    """Hands out losses and scores; counts iterations and seconds, recorded ones included.

    ``live`` is false while events are replayed. ``seconds`` are over all sessions of the run, by what they
    were spent on and in which stage (``forward1`` ...): evaluating; suggesting; making the journal durable;
    the rest of what the run did between two evaluations. ``dev`` and ``test`` are evaluations, too. They sum
    up to the run's wall time, but for what a run waited while others were served and for replays. Where
    evaluations of several runs are on a device at the same time, each run's are timed from launch to result:
    they overlap, and are longer than alone.
    ``load`` is what came before the first evaluation of this session: data, weights, libraries, and the
    replay if there is one.
    """

    def __init__(
        self,
        journal: Journal,
        records: list[Record],
        evaluate: Evaluate = timed,
        started: float | None = None,
        precision: str = "fp32",
    ) -> None:
        """``evaluate`` runs a computation and says how many seconds it took itself.

        ``started`` is when the session began (``time.perf_counter``; None: now). ``precision`` is what losses
        are computed in: where none is finite, it may be why.
        """
        self._journal = journal
        self._records = records
        self._evaluate = evaluate
        self._precision = precision
        self._position = 0
        self._stage = 1
        self._idle_since: float | None = None  # when the last live event was over; None: there was none
        self._loading_since: float | None = time.perf_counter() if started is None else started
        self._last_journal_s = 0.0  # of that event: it is written with the next one
        self.iteration = 0
        self.counts = {"train": 0, "dev": 0, "test": 0}
        names = [f"{name}{stage}" for stage in (1, 2) for name in SECONDS]
        self.seconds = dict.fromkeys([*names, "dev", "test", "load"], 0.0)
        self.n_non_finite = 0

    @property
    def live(self) -> bool:
        """Whether the next event will be computed."""
        return self._position >= len(self._records)

    def losses(
        self,
        stage: int,
        layer: int | None,
        candidates: NDArray[Any],
        compute: Callable[[], Pending[Floats]],
        *,
        suggest_s: float = 0.0,
        worst_so_far: float | None = None,
    ) -> Floats:
        """Losses [P] of one generation; those that are not finite become the worst finite one.

        Args:
            stage: 1 or 2.
            layer: the layer whose prompts the candidates are; ``None`` in stage I.
            candidates: [P, ...], hashed into the journal.
            compute: evaluates them; not called in a replay.
            suggest_s: what suggesting them took, journaled beside the time of the forward.
            worst_so_far: what candidates get if none is finite; for generations that are no population
                (a method that asks for one at a time, what the budget left of the last one).

        Raises:
            LossError: not one loss is finite; the generation is not journaled.
            MismatchError: the replayed generation is not the recorded one.
        """
        self._stage = stage
        hashes = _hashes(stage, layer, candidates)
        first = self.iteration
        what = f"iterations {first + 1} to {first + len(candidates)}"
        record = self._next("losses")
        if record is None:
            spent = self._spent(suggest_s)
            raw, spent["forward_s"] = self._compute(compute)
            losses = np.asarray(raw, dtype=np.float64)
            assert losses.shape == (len(candidates),), (
                f"{losses.shape} losses of {len(candidates)} candidates"
            )
            repaired, n_bad = _finite(losses, worst_so_far, what, self._blame(stage))
            shared = {"event": "losses", "stage": stage} | ({} if layer is None else {"layer": layer})
            of = [first, first + len(losses)]
            lines = [
                shared
                | {"iteration": first + 1 + i, "of": of, "candidate": hashes[i], "loss": finite_or_none(loss)}
                for i, loss in enumerate(losses.tolist())
            ]
            lines[0] |= _rounded(spent)
            self._append(lines)
        else:
            recorded = [line.get("candidate") for line in record.lines]
            if recorded != hashes or record.lines[0].get("of", [None])[0] != first:
                self._refuse(first + 1)
            values = [line["loss"] for line in record.lines]
            losses = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            repaired, n_bad = _finite(losses, worst_so_far, what, self._blame(stage))
            spent = _recorded(record, "forward_s", "suggest_s", "journal_s", "other_s")
        self.n_non_finite += n_bad
        self.iteration = first + len(losses)
        self.counts["train"] = self.iteration
        self._count(spent)
        return repaired

    def scores(self, split: str, at: str, prompt: NDArray[Any], compute: ComputeScores) -> Scores:
        """Score and loss of the prompt [L', d] on ``dev`` or ``test``, after the stage ``at``."""
        digest = _digest(prompt, split, at)
        record = self._next("scores")
        if record is None:
            spent = self._spent()
            found, seconds = self._compute(compute)
            scores: Scores = found
            line: dict[str, Any] = {"event": "scores", "split": split, "at": at, "iteration": self.iteration}
            line |= {"prompt": digest, "score": scores.score, "loss": finite_or_none(scores.loss)}
            line |= {} if scores.exact_match is None else {"exact_match": scores.exact_match}
            line |= {} if scores.calibration is None else {"calibration": dict(scores.calibration)}
            self._append([line | _rounded({"seconds": seconds, **spent})])
        else:
            line = record.lines[0]
            if line.get("prompt") != digest or line.get("iteration") != self.iteration:
                self._refuse(self.iteration)
            loss = line["loss"]
            loss = float("nan") if loss is None else float(loss)
            scores = Scores(float(line["score"]), loss, line.get("exact_match"), line.get("calibration"))
            spent = _recorded(record, "journal_s", "other_s")
            seconds = float(line.get("seconds", 0.0))
        self.counts[split] += 1
        self.seconds[split] += seconds
        self._count(spent)
        return scores

    def _blame(self, stage: int) -> str:
        """Why all losses of a generation may not be finite, and what to try."""
        if self._precision != "fp32":
            return f"{self._precision} often overflows: try --precision fp32"
        if stage == 2:
            return "Steps that are too long overflow: start a run with smaller ones (--sigma-...)"
        return "Weights do that in fp32: look at those of the backbone and of the prompts"

    def _compute(self, compute: Callable[[], Any]) -> tuple[Any, float]:
        """The result and its seconds."""
        if self._loading_since is not None:
            self.seconds["load"] = time.perf_counter() - self._loading_since
            self._loading_since = None
        return self._evaluate(compute)

    def _spent(self, suggest_s: float = 0.0) -> dict[str, float]:
        """Seconds since the last live event, by what they were spent on."""
        since = time.perf_counter() - self._idle_since if self._idle_since is not None else suggest_s
        other_s = max(0.0, since - suggest_s)
        return {"suggest_s": suggest_s, "journal_s": self._last_journal_s, "other_s": other_s}

    def _append(self, lines: list[dict[str, Any]]) -> None:
        start = time.perf_counter()
        self._journal.append(lines)
        self._idle_since = time.perf_counter()
        self._last_journal_s = self._idle_since - start

    def _count(self, spent: dict[str, float]) -> None:
        for name, seconds in spent.items():
            self.seconds[f"{name.removesuffix('_s')}{self._stage}"] += seconds

    def _next(self, event: str) -> Record | None:
        if self.live:
            return None
        record = self._records[self._position]
        if record.event != event:
            self._refuse(self.iteration)
        self._position += 1
        return record

    def _refuse(self, iteration: int) -> None:
        raise MismatchError(
            f"the replay leaves the recorded run at iteration {iteration} of {self._journal.path}: the data, "
            "the code or a library's version is not the one that wrote it (the journal's first line has the "
            "versions); go back to those, or start a new run"
        )


def _finite(losses: Floats, worst_so_far: float | None, what: str, blame: str) -> tuple[Floats, int]:
    finite = np.isfinite(losses)
    n_bad = int(np.count_nonzero(~finite))
    if n_bad == 0:
        return losses, 0
    if finite.any():
        worst = float(losses[finite].max())
    elif worst_so_far is not None:
        worst = worst_so_far
    else:
        raise LossError(
            f"all {len(losses)} losses of {what} are NaN or infinite; the journal is whole up to there. "
            + blame
        )
    warnings.warn(
        f"{n_bad} of {len(losses)} losses of {what} were NaN or infinite; "
        f"they count as the worst finite one, {worst:.4f}",
        NonFiniteLossWarning,
        stacklevel=3,
    )
    return np.where(finite, losses, worst), n_bad


def _hashes(stage: int, layer: int | None, candidates: NDArray[Any]) -> list[str]:
    if candidates.dtype == bool:  # a router is short enough to be written out: bits, most significant first
        return [np.packbits(c.reshape(-1)).tobytes().hex() for c in candidates]
    return [_digest(c, str(stage), str(layer)) for c in candidates]


def _digest(array: NDArray[Any], *context: str) -> str:
    h = hashlib.sha256("/".join(context).encode())
    h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()[:16]


def _recorded(record: Record, *names: str) -> dict[str, float]:
    return {name: float(record.lines[0].get(name, 0.0)) for name in names}


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in seconds.items()}
