"""Labels for new text by a tuned prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mp2.errors import FormatError, MissingDependencyError, UsageError
from mp2.runs.config import BbtConfig
from mp2.runs.frozen_model import FrozenModel, load_model
from mp2.runs.run_folder import how_to_end, read_config
from mp2.runs.tuned import check_fits, load_tuned

if TYPE_CHECKING:
    from mp2.engine.select import AnyObjective
    from mp2.tasks import Example, MrcInput, TaskCard

_Floats = NDArray[np.floating[Any]]

CHUNK = 256  # lines that are read, labelled and written at once


class Predictor:
    """A tuned prompt, ready to label.

    ::

        predictor = Predictor("runs/tnews-...")
        for line in predictor.predict_lines(open("new.jsonl", "rb"), "new.jsonl"):
            print(line)          # {"label": "news_story", "probability": 0.93}
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        backbone: str | None = None,
        prompts: str | None = None,
        engine: str | None = None,
        runtime: str | None = None,
        precision: str | None = None,
        device: str | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Load what a finished run of ``mp2 bbt`` or ``mp2 tune`` left in ``run_dir``.

        ``backbone``, ``prompts`` and ``engine`` say where these are now (None: where the run found them);
        ``runtime``, ``precision`` and ``device`` what to compute with (None: as in the run; if one of them is
        given, the others are chosen as ``mp2 bbt`` does). What the run computed with and this machine lacks
        is replaced by what it has, and ``note`` hears of it.

        Raises:
            UsageError: no run there, or one that has not ended.
            FormatError: its tuned prompt is missing or damaged; the message says how to make it again.
            MismatchError: backbone or prompts are not those of the run.
        """
        from mp2.tasks import MrcFormatter, load_card

        run_dir = Path(run_dir)
        config = read_config(run_dir)
        try:
            self._z, meta = load_tuned(run_dir / "prompt.safetensors")
        except FormatError as error:
            raise FormatError(f"{error}; {how_to_end(run_dir)}") from error
        self.card: TaskCard = load_card(run_dir / "card.toml")
        config = replace(
            config,
            backbone=backbone or config.backbone,
            prompts=prompts or config.prompts,
            engine=engine or config.engine,
        )
        if runtime or precision or device:
            config = _computed_with(config, runtime or "auto", precision or "auto", device or "auto")
            model = load_model(config)
        else:
            model = _load_here(config, note)
        check_fits(meta, backbone_sha256=model.backbone.sha256, prompts_sha256=model.prompts.sha256)
        self._formatter = MrcFormatter(self.card, model.backbone.tokenizer, meta.max_tokens)
        self._model = model
        self._objective: AnyObjective | None = None

    def predict_lines(self, lines: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
        """Predictions for JSON lines with the task's fields, or for lines of plain text (one-text tasks).

        Yields ``{"label" or "answer" or "option": ..., "probability": ...}`` for each line that is not blank.
        Classification and multiple choice: the probability is the softmax over the options' span scores;
        extraction: that of the span among all spans.

        Raises:
            FormatError: a bad line, with its number; or no line at all.
        """
        from mp2.tasks.data import parse_lines
        from mp2.tasks.problems import FirstProblem

        records = parse_lines(self.card, self._as_json(lines, name), name, FirstProblem(), labelled=False)
        while chunk := list(islice(records, CHUNK)):
            yield from self.predict(chunk)

    def predict(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Predictions for examples, in their order: dictionaries as of `predict_lines`.

        Raises:
            UsageError: options of an example leave no room for its text.
        """
        from mp2.engine import create_objective
        from mp2.tasks import decode

        for example in examples:
            if not self._formatter.fits(example):
                raise UsageError(
                    f"line {example.source_line}: its options leave no room for the text in "
                    f"{self._formatter.max_tokens} tokens; shorten them"
                )
        inputs = [made for i, e in enumerate(examples) for made in self._formatter.inputs(e, i)]
        if self._objective is None:  # it wants a training set, which log_probs does not use
            model = self._model
            self._objective = create_objective(model.runtime, model.backbone, model.prompts, inputs[:1])
        start, end = self._objective.log_probs(self._z, inputs)
        predictions = decode(self.card, examples, inputs, start, end)
        by_example: list[list[int]] = [[] for _ in examples]
        for number, item in enumerate(inputs):
            by_example[item.example].append(number)
        found = []
        for example, numbers, prediction in zip(examples, by_example, predictions, strict=True):
            outputs = [(inputs[n], start[n], end[n]) for n in numbers]
            if self.card.type == "extraction":
                probability = self._answer_probability(example, str(prediction), outputs)
                found.append({"answer": prediction, "probability": probability})
                continue
            probability = _option_probability(*outputs[0])
            if self.card.type == "classification":
                found.append({"label": prediction, "probability": probability})
            else:
                index = int(prediction)
                found.append({"label": index, "option": example.options[index], "probability": probability})
        return found

    def _as_json(self, lines: Iterable[bytes], name: str) -> Iterator[bytes]:
        """JSON lines as they are; plain text wrapped in the task's only field."""
        iterator = iter(lines)
        skipped = 0  # blank lines before the first; the numbers in messages count them
        for first in iterator:
            if first.strip():
                break
            skipped += 1
        else:
            raise FormatError("nothing to label; expected a text, or a JSON object, on each line", path=name)
        plain = not first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{")
        fields = self.card.fields
        if plain and (len(fields) != 1 or self.card.type == "multiple_choice"):
            raise UsageError(
                f"plain text cannot be given to task '{self.card.task}', which has the fields "
                f"{', '.join(fields)}: write each line as a JSON object with them"
            )
        for line in chain([b"\n"] * skipped, [first], iterator):
            yield _wrap(line, fields[0]) if plain else line

    def _answer_probability(
        self, example: Example, answer: str, outputs: Sequence[tuple[MrcInput, _Floats, _Floats]]
    ) -> float:
        """Probability of the best span that reads ``answer``; of [CLS] where there is no answer."""
        if not answer:
            return float(np.exp(min(float(s[0] + e[0]) for _, s, e in outputs)))
        context, best = example.fields["context"], -np.inf
        for item, s, e in outputs:
            if item.context_span is None:
                continue
            first = item.context_span[0]
            ends = {offset[1]: i for i, offset in enumerate(item.context_offsets)}
            for i, (begin, _) in enumerate(item.context_offsets):
                j = ends.get(begin + len(answer))
                if j is not None and context.startswith(answer, begin):
                    best = max(best, float(s[first + i] + e[first + j]))
        return float(np.exp(best))


def _option_probability(item: MrcInput, start: _Floats, end: _Floats) -> float:
    """Softmax over the options, of the best one."""
    scores = np.asarray(start[item.option_spans[:, 0]] + end[item.option_spans[:, 1]], dtype=np.float64)
    return float(1.0 / np.exp(scores - scores.max()).sum())


def _computed_with(config: BbtConfig, runtime: str, precision: str, device: str) -> BbtConfig:
    engine = None if runtime == "torch" else config.engine  # that one needs none, wherever it is now
    return replace(config, runtime=runtime, precision=precision, device=device, engine=engine)


def _load_here(config: BbtConfig, note: Callable[[str], None]) -> FrozenModel:
    """The run's model, on what it was computed with or, where that is not here, on torch."""
    try:
        return load_model(config)
    except MissingDependencyError as error:
        model = load_model(_computed_with(config, "torch", "auto", "auto"))
        here = f"{model.runtime.name}, {model.runtime.precision}, {model.runtime.device}"
        note(f"the run computed with {config.runtime}, {config.precision}, {config.device}: {error}")
        note(f"labelling with {here} instead; probabilities may differ in their last digits")
        return model


def _wrap(line: bytes, field: str) -> bytes:
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return line  # the reader of lines says so
    return json.dumps({field: text}).encode() if text else b"\n"


def predict_file(
    run_dir: Path, source: str, stdin: Iterable[bytes], **options: Any
) -> Iterator[dict[str, Any]]:
    """Predictions for a file, or for ``stdin`` if the source is ``-``; ``options`` as of `Predictor`."""
    if source == "-":
        yield from Predictor(run_dir, **options).predict_lines(stdin, "<stdin>")
        return
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"there is no file {source}; --input takes a file of lines, or - for standard input")
    predictor = Predictor(run_dir, **options)
    with path.open("rb") as file:
        yield from predictor.predict_lines(file, source)
