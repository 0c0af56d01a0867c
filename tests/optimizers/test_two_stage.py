"""The driver against a numpy objective: counts, invariants, and kills at every event."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp2.errors import LossError, MismatchError, Mp2Error
from mp2.optimizers.config import LayerConfig, RouterConfig
from mp2.optimizers.two_stage import Outcome, Scores, TwoStage
from mp2.runs.config import BbtConfig
from mp2.runs.journal import Journal, open_journal, read_journal
from mp2.runs.recorder import NonFiniteLossWarning, Recorder

from .hidden_prompt import HiddenPrompt


def config(**changes: object) -> BbtConfig:
    values: dict[str, object] = {
        "task": "t",
        "iters": 143,
        "router": RouterConfig(iterations=31),
        "layers": LayerConfig(popsize=6, sigma_input=0.1, sigma_deep=0.1),
    }
    return BbtConfig(**(values | changes))  # type: ignore[arg-type]


def at_once(compute: Callable[[], Any]) -> tuple[Any, float]:
    """The objective here is no engine's: what it returns is there."""
    return compute(), 0.0


def tune(
    path: Path,
    settings: BbtConfig,
    objective: HiddenPrompt | None = None,
    kind: str = "deep",
    precision: str = "fp32",
) -> Outcome:
    """Start, or go on where the journal ends."""
    objective = objective or HiddenPrompt()
    journal, _, records = open_journal(path, {})
    recorder = Recorder(journal, records, at_once, precision=precision)
    try:
        outcome = TwoStage(settings, objective, objective.space(kind), objective.dev, recorder).run()
        for checkpoint in (outcome.untuned, outcome.final):
            recorder.scores("test", checkpoint.at, checkpoint.z, lambda c=checkpoint: objective.dev(c.z))
        return outcome
    finally:
        journal.close()


def bits(outcome: Outcome) -> tuple[object, ...]:
    """Everything of an outcome, comparable bit by bit."""
    final = outcome.final
    return (
        final.z.tobytes(),
        final.at,
        final.iteration,
        final.train_loss,
        final.dev,
        [c.router.tobytes() for c in (outcome.untuned, outcome.stage1, final)],
        outcome.loss_curve,
        outcome.dev_curve,
        outcome.incumbent_loss,
    )


def without_times(path: Path) -> list[dict[str, object]]:
    _, records, _ = read_journal(path)
    times = {"forward_s", "suggest_s", "hidden_s", "journal_s", "other_s", "seconds"}
    return [{k: v for k, v in line.items() if k not in times} for r in records for line in r.lines]


class Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize(
    ("method", "dev_every"),
    [("bits", None), ("bits", 3), ("random", None), ("nevergrad:DiscreteOnePlusOne", None)],
)
def test_killed_at_every_journal_write_and_resumed_is_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dev_every: int | None
) -> None:
    router = RouterConfig(method=method, iterations=14)
    settings = config(router=router, iters=60, dev_every=dev_every)
    whole = bits(tune(tmp_path / "whole.jsonl", settings))
    expected = without_times(tmp_path / "whole.jsonl")
    write = Journal._write
    left = 0

    def dies(self: Journal, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            write(self, data[: len(data) * 2 // 3])  # torn inside a line, or between two
            raise Killed
        write(self, data)

    for n_writes in range(2, len(read_journal(tmp_path / "whole.jsonl")[1]) + 2):
        path = tmp_path / f"{n_writes}.jsonl"
        left = n_writes
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "_write", dies)
            with pytest.raises(Killed):
                tune(path, settings)
        assert bits(tune(path, settings)) == whole, f"killed at write {n_writes}"
        assert without_times(path) == expected


def test_dev_is_scored_within_stage_one_only_where_that_was_asked_for(tmp_path: Path) -> None:
    router = RouterConfig(method="random", iterations=100)
    plain, scored = (
        tune(tmp_path / f"{every}.jsonl", config(router=router, iters=100, dev_every=every))
        for every in (None, 20)
    )
    assert [iteration for iteration, _ in plain.dev_curve] == [1, 100]
    assert [iteration for iteration, _ in scored.dev_curve] == [1, 21, 41, 61, 81, 100]  # populations of 20
    assert scored.loss_curve == plain.loss_curve
    assert scored.stage1.router.tobytes() == plain.stage1.router.tobytes()


def test_killed_at_every_byte_of_the_journal_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    settings = config(router=RouterConfig(iterations=7), iters=22)
    whole = bits(tune(tmp_path / "whole.jsonl", settings))
    data = (tmp_path / "whole.jsonl").read_bytes()
    for size in range(0, len(data), 23):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(data[:size])
        assert bits(tune(path, settings)) == whole, f"torn after {size} bytes"
        assert without_times(path) == without_times(tmp_path / "whole.jsonl")


def test_a_whole_journal_is_replayed_without_any_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = bits(tune(path, config()))
    before = path.read_bytes()
    objective = HiddenPrompt()
    objective.calls.clear()
    assert bits(tune(path, config(), objective)) == first
    assert objective.calls == []
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["deep", "shallow"])
@pytest.mark.parametrize("iters", [1, 2, 31, 32, 37, 143])
def test_iterations_are_exactly_what_was_asked_for(tmp_path: Path, iters: int, kind: str) -> None:
    objective = HiddenPrompt(n_layers=1 if kind == "shallow" else 3, n_modules=8)
    router = RouterConfig(iterations=min(31, iters))
    tune(tmp_path / "journal.jsonl", config(iters=iters, router=router), objective, kind)
    lines = [line for line in without_times(tmp_path / "journal.jsonl") if line["event"] == "losses"]
    assert [line["iteration"] for line in lines] == list(range(1, iters + 1))
    assert sum(line["stage"] == 1 for line in lines) == min(31, iters)


def test_training_loss_of_the_incumbent_never_rises_and_is_its_exact_loss(tmp_path: Path) -> None:
    objective = HiddenPrompt()
    outcome = tune(tmp_path / "journal.jsonl", config(iters=400), objective)
    losses = [loss for _, loss in outcome.loss_curve]
    assert losses == sorted(losses, reverse=True)
    assert objective.incumbent is not None
    assert objective._losses(objective.incumbent[None])[0] == outcome.incumbent_loss
    assert outcome.incumbent_loss < losses[30] < losses[0]  # stage I ends at iteration 31
    assert outcome.incumbent_loss < 0.1 * losses[0]


class Watched(HiddenPrompt):
    """Also lists every generation of stage II and every commit, with the incumbent's loss just then."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, float, float | None]] = []  # layer, generation's best, committed loss

    def layer_losses(self, layer: int, z: np.ndarray) -> np.ndarray:
        losses = super().layer_losses(layer, z)
        self.events.append((layer, float(losses.min()), None))
        return losses

    def commit(self, layer: int, z: np.ndarray) -> None:
        super().commit(layer, z)
        assert self.incumbent is not None
        at, best, _ = self.events[-1]
        self.events[-1] = (at, best, float(self._losses(self.incumbent[None])[0]))


def test_keep_ever_is_bbtv2s_rule_and_the_loss_is_still_the_incumbents(tmp_path: Path) -> None:
    """A layer takes its generation's best exactly where that is its own best so far, better now or not."""
    objective = Watched()
    layers = LayerConfig(popsize=6, sigma_input=0.5, sigma_deep=0.5, keep="ever")
    outcome = tune(tmp_path / "journal.jsonl", config(iters=400, layers=layers), objective)
    best = [math.inf] * 3
    for layer, loss, committed in objective.events[:-1]:  # the last generation may be cut short
        assert (committed is not None) == (loss < best[layer])
        if committed is not None:
            assert committed == pytest.approx(loss)
        best[layer] = min(best[layer], loss)
    curve = [loss for _, loss in outcome.loss_curve]
    assert curve != sorted(curve, reverse=True)  # it may rise, and did
    assert objective.incumbent is not None
    assert objective._losses(objective.incumbent[None])[0] == outcome.incumbent_loss
    whole = bits(outcome)
    assert bits(tune(tmp_path / "journal.jsonl", config(iters=400, layers=layers))) == whole
    data = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "torn.jsonl").write_bytes(data[: len(data) // 2])
    assert bits(tune(tmp_path / "torn.jsonl", config(iters=400, layers=layers))) == whole


def test_final_is_never_worse_on_dev_than_untuned_or_stage_one(tmp_path: Path) -> None:
    for seed in range(4):
        outcome = tune(tmp_path / f"{seed}.jsonl", config(seed=seed), HiddenPrompt(seed))
        assert outcome.final.rank() <= min(outcome.untuned.rank(), outcome.stage1.rank())


def test_ties_on_dev_go_to_the_lower_loss_then_to_the_earlier(tmp_path: Path) -> None:
    class Flat(HiddenPrompt):
        def dev(self, z: np.ndarray):  # type: ignore[no-untyped-def]
            scores = super().dev(z)
            return type(scores)(0.5, 1.0)

    assert tune(tmp_path / "a.jsonl", config(), Flat()).final.at == "untuned"


def test_router_only_stops_after_stage_one(tmp_path: Path) -> None:
    outcome = tune(tmp_path / "journal.jsonl", config(router_only=True))
    assert {line.get("stage", 1) for line in without_times(tmp_path / "journal.jsonl")} == {1}
    assert outcome.final.at in ("untuned", "stage1")


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    runs = [bits(tune(tmp_path / f"{i}.jsonl", config(seed=seed))) for i, seed in enumerate((8, 8, 13))]
    assert runs[0] == runs[1] != runs[2]


def test_numpys_global_generator_is_neither_read_nor_seeded(tmp_path: Path) -> None:
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].tobytes()  # noqa: NPY002
    first = bits(tune(tmp_path / "a.jsonl", config()))
    assert np.random.get_state()[1].tobytes() == before  # noqa: NPY002
    np.random.seed(4)  # noqa: NPY002
    assert bits(tune(tmp_path / "b.jsonl", config())) == first


class Spoilt(HiddenPrompt):
    """Some losses are NaN or infinite."""

    def __init__(self, every: int) -> None:
        self.n, self.every = 0, every
        super().__init__()

    def _losses(self, z: np.ndarray) -> np.ndarray:
        losses = super()._losses(z)
        for i in range(len(losses)):
            self.n += 1
            if self.n > 40 and self.n % self.every == 0:
                losses[i] = [np.nan, np.inf, -np.inf][self.n % 3]
        return losses


def test_non_finite_losses_become_the_worst_of_the_generation_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with pytest.warns(NonFiniteLossWarning, match=r"1 of \d losses .* NaN or infinite"):
        outcome = tune(path, config(), Spoilt(7))
    assert all(math.isfinite(loss) for _, loss in outcome.loss_curve)
    assert any(line["event"] == "losses" and line["loss"] is None for line in without_times(path))


def test_a_whole_generation_of_nan_stops_with_the_journal_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with (
        pytest.warns(NonFiniteLossWarning, match="5 of 6"),
        pytest.raises(LossError, match=r"all 6 losses of iterations \d+ to \d+ are NaN"),
    ):
        tune(path, config(), Spoilt(1))
    _, records, whole = read_journal(path)
    assert whole == path.stat().st_size
    n_losses = sum(len(r.lines) for r in records if r.event == "losses")
    assert n_losses >= 31
    with pytest.warns(NonFiniteLossWarning):  # the replay says so again
        tune(path, config())  # an objective that recovered goes on from there
    assert sum(line["event"] == "losses" for line in without_times(path)) == 143


@pytest.mark.parametrize(
    ("precision", "blame"),
    [("bf16", "bf16 often overflows: try --precision fp32"), ("fp32", r"Steps .* smaller ones \(--sigma-")],
)
def test_steps_that_leave_float32_end_in_one_message_and_no_warning(
    tmp_path: Path, precision: str, blame: str
) -> None:
    """Candidates that overflow when they become float32 have losses that are not finite: that is said."""
    layers = LayerConfig(popsize=6, sigma_input=1e300, sigma_deep=1e300)
    with pytest.raises(LossError, match=f"all 6 losses of iterations 32 to 37 are NaN.* {blame}"):
        tune(tmp_path / "journal.jsonl", config(layers=layers), Overflowing(), precision=precision)


class Overflowing(HiddenPrompt):
    """As a backbone does: what is not finite gives a loss that is not finite."""

    def layer_losses(self, layer: int, z: np.ndarray) -> np.ndarray:
        return np.where(np.isfinite(z).all(1), 0.0, np.nan)


def test_weights_that_are_not_finite_are_no_matter_of_precision(tmp_path: Path) -> None:
    class Damaged(HiddenPrompt):
        def _losses(self, z: np.ndarray) -> np.ndarray:
            return np.full(len(z), np.nan)

    with pytest.raises(LossError, match="Weights do that in fp32") as raised:
        tune(tmp_path / "journal.jsonl", config(), Damaged())
    assert "--precision" not in str(raised.value)


class SpoiltEnd(HiddenPrompt):
    """Generations of one candidate have no finite loss."""

    def layer_losses(self, layer: int, z: np.ndarray) -> np.ndarray:
        losses = super().layer_losses(layer, z)
        return losses if len(z) > 1 else np.full(1, np.nan)


def test_a_lone_nan_that_the_budget_left_at_the_end_ends_the_run_all_the_same(tmp_path: Path) -> None:
    budget = 31 + 6 * 18 + 1
    with pytest.warns(NonFiniteLossWarning, match=f"1 of 1 losses of iterations {budget} to {budget}"):
        outcome = tune(tmp_path / "journal.jsonl", config(iters=budget), SpoiltEnd())
    assert outcome.loss_curve[-1] == (budget, outcome.incumbent_loss)
    assert math.isfinite(outcome.incumbent_loss)


class UntunedIsBest(HiddenPrompt):
    """Dev likes the first prompt that it sees."""

    def dev(self, z: np.ndarray) -> Scores:
        scores = super().dev(z)
        return Scores(1.0 if self.calls.count("dev") == 1 else 0.5, scores.loss)


def test_every_stages_prompt_comes_with_the_router_that_fused_it(tmp_path: Path) -> None:
    objective = HiddenPrompt()
    outcome = tune(tmp_path / "one.jsonl", config(), objective)
    assert outcome.untuned.router.all()
    assert not outcome.stage1.router.all()
    assert np.array_equal(objective.fuse(outcome.stage1.router), outcome.stage1.z)
    assert outcome.final.at == "stage2"
    assert np.array_equal(outcome.final.router, outcome.stage1.router)
    outcome = tune(tmp_path / "two.jsonl", config(), UntunedIsBest())
    assert outcome.final is outcome.untuned
    assert outcome.final.router.all()


def test_a_replay_that_leaves_the_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    tune(path, config(iters=60))
    with pytest.raises(MismatchError, match="leaves the recorded run at iteration"):
        tune(path, config(iters=60, seed=9))


def test_a_full_disk_loses_only_the_generation_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    whole = bits(tune(tmp_path / "whole.jsonl", config()))
    write, room = Journal._write, 6000

    def full(self: Journal, data: bytes) -> None:
        nonlocal room
        if len(data) > room:
            write(self, data[:room])
            raise OSError(28, "No space left on device")
        room -= len(data)
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write", full)
        with pytest.raises(
            Mp2Error, match=r"No space left on device.*generation in flight.*mp2 bbt --resume"
        ):
            tune(path, config())
    assert bits(tune(path, config())) == whole


def test_libraries_are_imported_before_the_first_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = HiddenPrompt()
    monkeypatch.setattr("mp2.optimizers.two_stage.import_cma", lambda: objective.calls.append("import"))
    tune(tmp_path / "two.jsonl", config(), objective)
    assert objective.calls.index("import") == 0
    objective.calls.clear()
    tune(tmp_path / "one.jsonl", config(router_only=True), objective)
    assert "import" not in objective.calls


def test_loading_ends_with_the_first_evaluation(tmp_path: Path) -> None:
    journal, _, records = open_journal(tmp_path / "j.jsonl", {})
    recorder = Recorder(journal, records, at_once, started=time.perf_counter() - 50)
    for _ in range(2):
        recorder.losses(1, None, np.ones((1, 2), dtype=bool), lambda: np.zeros(1))
    journal.close()
    assert 50 <= recorder.seconds["load"] < 51


def test_without_dev_the_training_loss_selects_and_nothing_is_scored(tmp_path: Path) -> None:
    settings, objective = config(), HiddenPrompt()
    journal, _, records = open_journal(tmp_path / "j.jsonl", {})
    recorder = Recorder(journal, records, at_once)
    outcome = TwoStage(settings, objective, objective.space("deep"), None, recorder).run()
    journal.close()
    assert recorder.counts["dev"] == 0
    assert outcome.dev_curve == []
    assert outcome.final.dev is None
    assert outcome.final.dev_score is None
    assert outcome.final.train_loss == outcome.incumbent_loss == min(loss for _, loss in outcome.loss_curve)
    assert outcome.final.train_loss < outcome.untuned.train_loss
