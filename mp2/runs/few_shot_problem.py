"""What a run optimises: a task's few-shot training set under a frozen backbone and its modular prompts.

Everything that can be wrong with the input is found here, before a run folder exists and before any forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mp2.optimizers.router_search import stage_one_iterations
from mp2.optimizers.two_stage import Prompt, Scores, Space
from mp2.runs.config import BbtConfig
from mp2.runs.frozen_model import FrozenModel
from mp2.runs.head_choice import HeadChooser
from mp2.runs.task_data import TaskData

if TYPE_CHECKING:
    from mp2.engine import Pending
    from mp2.tasks import Example, MrcInput, TaskCard
    from mp2.tasks.decode import Decoded


class FewShotProblem:
    """Few-shot train and dev of one task and seed, formatted; the training loss; scores on any split."""

    def __init__(
        self,
        config: BbtConfig,
        card: TaskCard,
        model: FrozenModel,
        data: TaskData | None = None,
        begun_with: tuple[str, str] | None = None,
    ) -> None:
        """``data``: the task's, where another seed has read it already.

        ``begun_with``: kind and reason of the head that a run which goes on was begun with: ``auto`` does not
        choose again.
        """
        from mp2.engine import Objective, Scorer
        from mp2.tasks import few_shot_split

        self.config, self.card, self.model = config, card, model
        space = model.space()
        shape = (space.n_layers, space.n_modules)
        stage_one_iterations(config.router.method, config.router.iterations, model.kind, shape, config.iters)
        self.data = data or TaskData(config, card, model)
        self.max_tokens = self.data.max_tokens
        self.split = few_shot_split(
            card,
            self.data.pool,
            config.seed,
            config.shots,
            dev_examples=self.data.dev_pool if config.dev == "auto" else (),
            select=config.dev == "auto",
        )
        split = self.split
        self._dev = split.dev
        chooser = HeadChooser(
            card, model.backend, model.prompts, self.data.formatter, split.train, config.ridge_features
        )
        self.head = chooser.choose(config.head) if begun_with is None else chooser.choose(*begun_with)
        self.train_inputs = self.head.train_inputs
        self.dev_inputs = self.data.inputs(split.dev, self.head.kind)
        self.n_train, self.n_dev = len(split.train), len(split.dev)
        if config.test:
            _ = self.data.fitting_tests  # what is wrong with them is said now, not when all is tuned
        self.data_sha256 = _inputs_sha256([*self.train_inputs, *self.dev_inputs])
        forward = model.backend.forward(model.prompts, self.head.head)
        self.objective = Objective(forward, self.train_inputs)
        self.scorer = Scorer(forward)

    @property
    def remarks(self) -> list[str]:
        """What is not as asked for, or not as it should be, of the examples: said when a run begins."""
        from mp2.tasks.fewshot import n_also_in

        remarks = list(self.split.remarks)
        tests = self.data.tests if self.config.test else []
        if n := n_also_in([*self.split.train, *self.split.dev], tests):
            remarks.append(f"{n} of {self.n_test} test examples are also in train or dev")
        return remarks

    @property
    def space(self) -> Space:
        """What is searched: of deep prompts, those at layers that the head reads."""
        space, read = self.model.space(), self.head.head.layer
        if space.kind == "shallow" or read is None:
            return space
        return replace(space, n_moved=min(read, space.n_layers))

    @property
    def on_dev(self) -> Callable[[Prompt], Pending[Scores]] | None:
        """`dev_scores`; None where there is no dev set."""
        return self.dev_scores if self._dev else None

    def dev_scores(self, z: Prompt) -> Pending[Scores]:
        """Score and loss of z [L', d] on the few-shot dev set; the loss is the mean over `has_gold`.

        ``calibration`` is with the temperature that suits this set best.
        """
        return self._scores(z, self._dev, self.dev_inputs, None)

    def test_scores(self, z: Prompt, temperature: float) -> Pending[Scores]:
        """Score and loss of z [L', d] on the test set; examples that do not fit count as wrong.

        ``calibration`` is with ``temperature``, over those that fit.
        """
        fitting = self.data.fitting_tests
        share = len(fitting) / self.n_test
        return self._scores(z, fitting, self.test_inputs(), temperature).then(
            lambda scores: replace(
                scores,
                score=scores.score * share,
                exact_match=None if scores.exact_match is None else scores.exact_match * share,
            )
        )

    def test_inputs(self) -> list[MrcInput]:
        """The sequences that a test evaluation runs."""
        return self.data.test_inputs(self.head.kind)

    @property
    def n_test(self) -> int:
        """Test examples that are scored."""
        return len(self.data.tests)

    def _scores(
        self, z: Prompt, examples: Sequence[Example], inputs: Sequence[MrcInput], temperature: float | None
    ) -> Pending[Scores]:
        from mp2.tasks import decode, exact_match, score
        from mp2.tasks.calibration import answer_rows, fitted_temperature

        reader = self.objective.reader(z)

        def scored(outputs: list[np.ndarray]) -> Scores:
            counted = [i for i, counts in enumerate(has_gold(self.card, inputs)) if counts]
            losses = reader.gold_losses([inputs[i] for i in counted], [outputs[i] for i in counted])
            scores = [reader.scores(item, output) for item, output in zip(inputs, outputs, strict=True)]
            found = decode(self.card, examples, inputs, scores)
            predictions = [one.prediction for one in found]
            exact = exact_match(predictions, examples) if self.card.type == "extraction" else None
            fitted = fitted_temperature(*answer_rows(inputs, scores)) if temperature is None else temperature
            return Scores(
                float(score(self.card, predictions, examples)),
                float(np.mean(losses)),
                exact,
                calibration(examples, found, decode(self.card, examples, inputs, scores, fitted), fitted),
            )

        return self.scorer.outputs(z, inputs).then(scored)


def calibration(
    examples: Sequence[Example], before: Sequence[Decoded], after: Sequence[Decoded], temperature: float
) -> dict[str, float] | None:
    """What a temperature does to the probabilities of answers; None where these are no numbers.

    ``error`` is the expected calibration error (`mp2.tasks.calibration`); of extraction an answer is right
    where it matches exactly.
    """
    from mp2.tasks.calibration import calibration_error
    from mp2.tasks.metrics import is_right

    right = [is_right(example, found.prediction) for example, found in zip(examples, after, strict=True)]
    old, new = ([found.probability for found in several] for several in (before, after))
    if not np.isfinite([*old, *new]).all():
        return None
    return {
        "temperature": temperature,
        "error_before": calibration_error(old, right),
        "error": calibration_error(new, right),
        "mean_probability_before": float(np.mean(old)),
        "mean_probability": float(np.mean(new)),
    }


def has_gold(card: TaskCard, inputs: Sequence[MrcInput]) -> list[bool]:
    """Which inputs a mean loss is over: those with a gold span.

    A window of a long context that does not hold the answer points at [CLS]; there are several for each that
    does, and their losses say little of the answers. They count only where [CLS] is the answer: for examples
    without one, if the card has such.
    """
    answered = {item.example for item in inputs if item.start > 0}
    counted = [item.start > 0 or (card.unanswerable and item.example not in answered) for item in inputs]
    return counted if any(counted) else [True] * len(inputs)


def _inputs_sha256(inputs: Sequence[MrcInput]) -> str:
    h = hashlib.sha256()
    for item in inputs:
        h.update(np.asarray(item.input_ids, dtype="<i8").tobytes())
        h.update(f"{item.start} {item.end};".encode())
        if len(item.segments):  # of heads that read no span the answer stands in `label` alone
            h.update(f"{item.label} {item.segments.tolist()};".encode())
    return h.hexdigest()
