"""Labels for new text by a tuned prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp2.errors import FormatError, MissingDependencyError, UsageError
from mp2.runs.config import BbtConfig
from mp2.runs.frozen_model import FrozenModel, load_model
from mp2.runs.run_folder import how_to_end, read_config
from mp2.runs.tuned import check_fits, load_tuned

if TYPE_CHECKING:
    from mp2.tasks import Example, TaskCard

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
        revision: str | None = None,
        prompts: str | None = None,
        engine: str | None = None,
        runtime: str | None = None,
        precision: str | None = None,
        device: str | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Load what a finished run of ``mp2 bbt`` or ``mp2 tune`` left in ``run_dir``.

        ``backbone`` (with ``revision``), ``prompts`` and ``engine`` say where these are now (None: where the
        run found them);
        ``runtime``, ``precision`` and ``device`` what to compute with (None: as in the run; if one of them is
        given, the others are chosen as ``mp2 bbt`` does). What the run computed with and this machine lacks
        is replaced by what it has, and ``note`` hears of it.

        Raises:
            UsageError: no run there, or one that has not ended.
            FormatError: its tuned prompt is missing or damaged; the message says how to make it again.
            MismatchError: backbone or prompts are not those of the run.
        """
        from mp2.engine import Scorer
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
            revision=revision if backbone or revision else config.revision,
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
        self._scorer = Scorer(model.runtime.forward(model.prompts))

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
        from mp2.tasks import decode

        for example in examples:
            if not self._formatter.fits(example):
                raise UsageError(
                    f"line {example.source_line}: its options leave no room for the text in "
                    f"{self._formatter.max_tokens} tokens; shorten them"
                )
        inputs = [made for i, e in enumerate(examples) for made in self._formatter.inputs(e, i)]
        head, outputs = self._scorer.forward.head, self._scorer.outputs(self._z, inputs).fetch()
        scores = [head.scores(item, output) for item, output in zip(inputs, outputs, strict=True)]
        key = "answer" if self.card.type == "extraction" else "label"
        found: list[dict[str, Any]] = []
        for example, decoded in zip(examples, decode(self.card, examples, inputs, scores), strict=True):
            line: dict[str, Any] = {key: decoded.prediction}
            if self.card.type == "multiple_choice":
                line["option"] = example.options[int(decoded.prediction)]
            found.append({**line, "probability": decoded.probability})
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
