"""One run in its folder: driven through its journal, finished with its result.

``config.json`` (with what was resolved and the versions), ``card.toml`` (the task card as it was),
``journal.jsonl``, and at the end ``prompt.safetensors``, ``result.json``, ``curve.png``. The journal is also
the checkpoint (``docs/concepts.md``); :mod:`mp2.runs.series` makes, locks and resumes the folders.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp2.errors import UsageError
from mp2.files import write_json, write_text
from mp2.json_files import read_object
from mp2.optimizers.config import LayerConfig
from mp2.optimizers.two_stage import Outcome, Scores, TwoStage
from mp2.runs.config import BbtConfig
from mp2.runs.curve import draw_curve
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import FrozenModel, load_model, resolve_paths
from mp2.runs.journal import open_journal
from mp2.runs.loggers.logger import Logger, RunStart
from mp2.runs.plan import iterations_of
from mp2.runs.provenance import check_identity, config_file, identity, versions
from mp2.runs.recorder import Evaluate, Recorder
from mp2.runs.result import run_result, score_tests, tuned_meta
from mp2.runs.run_folder import says_how_to_go_on
from mp2.runs.task_data import TaskData
from mp2.runs.tuned import head_tensors, save_tuned

if TYPE_CHECKING:
    from mp2.engine import Objective
    from mp2.engine.agreement import Agreement

_AGREEMENT = "precision_agreement"  # of config.json and result.json; null in float32


def make_problem(
    config: BbtConfig, model: FrozenModel | None = None, data: TaskData | None = None
) -> FewShotProblem:
    """What the config asks for, with everything resolved; raises ``UsageError`` where that is impossible.

    ``model`` and ``data`` are what another run of the same series has loaded.
    """
    from mp2.tasks import load_card

    card = data.card if data else load_card(config.task)
    config = resolve_paths(config)
    model = model or load_model(config)
    runtime = model.backend
    config = replace(config, runtime=runtime.name, precision=runtime.precision, device=str(runtime.device))
    if not model.prompts.meta.prompt_tokens:
        raise UsageError(
            f"{config.prompts} is a span head without prompts: 'mp2 scratch --head' makes some with it"
        )
    problem = FewShotProblem(config, card, model, data)
    _check_popsize(problem)
    return problem


def _check_popsize(problem: FewShotProblem) -> None:
    """Raise ``UsageError`` for a population that was chosen and that stage II has no iterations for.

    A short run may keep the default one: it is said at its start that no generation is whole.
    """
    config, (_, stage2) = problem.config, iterations_of(problem)
    popsize = config.layers.popsize
    if popsize > stage2 and popsize != LayerConfig().popsize and not config.router_only:
        raise UsageError(
            f"popsize is {popsize}, but stage II has {stage2} of the {config.iters} iterations: it needs a "
            "whole generation; give a smaller --popsize, more --iters or fewer --router-iters"
        )


class Run:
    """A run whose folder is there and locked by us."""

    def __init__(
        self,
        run_dir: Path,
        problem: FewShotProblem,
        logger: Logger | None = None,
        started: float | None = None,
    ) -> None:
        """``started``: when this session began to load (``time.perf_counter``; None: now)."""
        self.run_dir = run_dir
        self._started = started
        self.ended = False
        self._problem, self._logger = problem, logger or Logger()
        self._recorder: Recorder | None = None

    @property
    def iteration(self) -> int:
        """Where it is."""
        return 0 if self._recorder is None else self._recorder.iteration

    @property
    def objective(self) -> Objective:
        """What it tunes on."""
        return self._problem.objective

    def write_beginning(self, agreement: Agreement | None) -> None:
        """Write the files that a run has before its first forward; ``agreement``: of its precision."""
        problem = self._problem
        write_text(self.run_dir / "card.toml", Path(problem.card.path).read_text(encoding="utf-8"))
        found = None if agreement is None else agreement.as_dict()
        values = {**config_file(problem.config, problem.model), _AGREEMENT: found}
        values["head"] = problem.head.as_dict()
        write_json(self.run_dir / "config.json", values)

    def drive(self, evaluate: Evaluate) -> tuple[Outcome, dict[str, Scores]]:
        """Begin, or go on where the journal ends; the outcome and the stages' test scores.

        May run in any thread: all forwards go through ``evaluate``, though what is only launched there is
        fetched and decoded here.
        """
        problem, path = self._problem, self.run_dir / "journal.jsonl"
        journal, header, records = open_journal(path, {**identity(problem), "versions": versions()})
        recorder = self._recorder = Recorder(
            journal, records, evaluate, self._started, problem.config.precision
        )

        try:
            check_identity(path, header, identity(problem))
            self._logger.start(self._begun())
            outcome = TwoStage(
                problem.config,
                problem.objective,
                problem.space,
                problem.on_dev,
                recorder,
                self._logger,
            ).run()
            return outcome, score_tests(problem, outcome, recorder)
        except BaseException:
            self._logger.end(None)
            raise
        finally:
            journal.close()

    def _begun(self) -> RunStart:
        config, model = self._problem.config, self._problem.model
        return RunStart(
            run_dir=self.run_dir,
            task=self._problem.card.task,
            method=config.label(model.kind),
            seed=config.seed,
            backbone=model.backbone.config.name,
            config=config.to_json(),
        )

    def finish(self, found: tuple[Outcome, dict[str, Scores]]) -> dict[str, Any]:
        """Write the tuned prompt, the curve and, last, the result, which is returned."""
        problem, recorder, (outcome, tests) = self._problem, self._recorder, found
        assert recorder is not None
        result = run_result(self.run_dir, problem, outcome, recorder, tests)
        # as it was found at the run's beginning, whoever ends it
        begun = read_object(self.run_dir / "config.json")
        result[_AGREEMENT] = begun.get(_AGREEMENT)
        with says_how_to_go_on(self.run_dir):
            head = problem.objective.reader(outcome.final.z)
            meta = tuned_meta(problem, outcome, head)
            save_tuned(self.run_dir / "prompt.safetensors", outcome.final.z, meta, head_tensors(head))
            draw_curve(self.run_dir / "curve.png", outcome, result)
            write_json(self.run_dir / "result.json", result)  # last: it says that the run has ended
        self.ended = True
        self._logger.end(result)
        del self._problem, self._recorder  # the objective's caches are not needed while others go on
        return result
