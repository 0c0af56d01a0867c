"""Labels for new text by a tuned prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp2.errors import FormatError, LossError, MissingDependencyError, UsageError, shown
from mp2.runs.config import BbtConfig
from mp2.runs.frozen_model import FrozenModel, load_model
from mp2.runs.needs import located, say_what_it_loads, untyped
from mp2.runs.run_folder import how_to_end, read_config
from mp2.runs.tuned import check_fits, load_tuned, run_card, tuned_head
from mp2.tasks.faults import FirstFault
from mp2.tasks.record import Columns, RecordParser, is_blank
from mp2.tasks.record_files import (
    TABLES,
    Records,
    check_no_workbook,
    ending,
    is_lines,
    json_lines,
    read_records,
)
from mp2.text_files import check_file

if TYPE_CHECKING:
    from mp2.tasks import Example, TaskCard

CHUNK = 256  # lines that are read, labelled and written at once
_OURS = ("label", "answer", "option", "probability", "reason")
"""Columns of the output: those of the input that are called so become ``input_label`` ..."""


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
        field: Sequence[str] = (),
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Load what a finished run of ``mp2 bbt`` or ``mp2 tune`` left in ``run_dir``.

        ``backbone`` (with ``revision``), ``prompts`` and ``engine`` say where these are now (None: where the
        run found them); ``field`` what the card's keys are called in the input (``KEY=NAME``; empty: as in
        the run's data);
        ``runtime``, ``precision`` and ``device`` what to compute with (None: as in the run; if one of them is
        given, the others are chosen as ``mp2 bbt`` does). What the run computed with and this machine lacks
        is replaced by what it has, and ``note`` hears of it.

        Raises:
            UsageError: no run there, or one that has not ended.
            FormatError: its tuned prompt is missing or damaged; the message says how to make it again.
            MismatchError: backbone or prompts are not those of the run.
        """
        from mp2.engine import Scorer
        from mp2.tasks import ClozeFormatter, FieldFormatter, MrcFormatter
        from mp2.tasks.record import parse_fields

        run_dir = Path(run_dir)
        config = read_config(run_dir)
        try:
            self._z, meta = load_tuned(run_dir / "prompt.safetensors")
        except FormatError as error:
            raise FormatError(f"{error}; {how_to_end(run_dir)}") from error
        self.card: TaskCard = run_card(run_dir, meta)
        places = {"backbone": backbone, "prompts": prompts, "engine": engine}
        if runtime == "torch":
            config = replace(config, engine=None)  # that one needs none, wherever it is now
        recorded, config = config, located(run_dir, config, places | {"revision": revision})
        say_what_it_loads(run_dir, untyped(recorded, places), note)
        if runtime or precision or device:
            config = _computed_with(config, runtime or "auto", precision or "auto", device or "auto")
            model = load_model(config)
        else:
            model = _load_here(config, note)
        check_fits(meta, self._z, model.prompts, backbone_sha256=model.backbone.sha256)
        self._fields = parse_fields(field or config.field, self.card)
        kinds: dict[str, type[Any]] = {"mlm": ClozeFormatter, "ridge": FieldFormatter}
        formatter = kinds.get(meta.head.get("kind", "span"), MrcFormatter)
        self._formatter = formatter(self.card, model.backbone.tokenizer, meta.max_tokens)
        words = getattr(self._formatter, "words", ())
        head = tuned_head(run_dir / "prompt.safetensors", meta, model.backbone, model.prompts, words)
        self._temperature = meta.temperature
        self._scorer = Scorer(model.backend.forward(model.prompts, head))
        self._scorer.prepare(self._z)

    def predict_lines(
        self, lines: Iterable[bytes], name: str, keep: Sequence[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """Predictions for JSON lines with the task's fields, or for lines of plain text (one-text tasks).

        Yields ``{"label" or "answer" or "option": ..., "probability": ...}`` for each line, in order, the
        columns ``keep`` before it. A blank line and an empty text have the label and probability None and a
        ``reason``. Classification and multiple choice: the probability is the softmax over the options' span
        scores; extraction: that of the span among all spans.

        Raises:
            FormatError: a bad line, with its number; or no line at all.
            LossError: scores that are no numbers.
        """
        yield from self._predict_records(_text_records(self.card, lines, name), name, keep)

    def predict_table(self, path: Path, keep: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Predictions for the rows of a table (CSV, TSV, parquet) or JSON array.

        The columns ``keep`` stand before them, all columns where it is None.
        """
        yield from self._predict_records(read_records(path, FirstFault(), to_label=True), str(path), keep)

    def _predict_records(
        self, records: Records, name: str, keep: Sequence[str] | None
    ) -> Iterator[dict[str, Any]]:
        key = "answer" if self.card.type == "extraction" else "label"
        answers = (key, "option") if self.card.type == "multiple_choice" else (key,)
        entries = _lines(self.card, records, name, self._fields, keep)
        while chunk := list(islice(entries, CHUNK)):
            labelled = [entry.example for entry in chunk if entry.example is not None]
            found = iter(self.predict(labelled) if labelled else [])
            for entry in chunk:
                none = dict.fromkeys((*answers, "probability"), None) | {"reason": entry.reason}
                kept = {f"input_{k}" if k in _OURS else k: value for k, value in entry.kept.items()}
                yield kept | (none if entry.example is None else next(found))

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
        for example, decoded in zip(
            examples, decode(self.card, examples, inputs, scores, self._temperature), strict=True
        ):
            line: dict[str, Any] = {key: decoded.prediction}
            if self.card.type == "multiple_choice":
                line["option"] = example.options[int(decoded.prediction)]
            if not math.isfinite(decoded.probability):
                raise LossError(
                    f"line {example.source_line}: its scores are no numbers; label with --precision fp32"
                )
            found.append({**line, "probability": decoded.probability})
        return found


@dataclass(frozen=True)
class _Line:
    """One line: an example to label, or the ``reason`` why it gets no label; ``kept`` is copied beside it."""

    example: Example | None
    reason: str | None
    kept: dict[str, Any]


def _text_records(card: TaskCard, lines: Iterable[bytes], name: str) -> Records:
    """Yield (line, object, or None for a blank line) of JSON lines, or of plain text for a task of one text.

    Raises:
        FormatError: a line that cannot be read; or no line with anything.
        UsageError: plain text for a task of several fields.
    """
    plain: bool | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            yield number, None
            continue
        if plain is None:
            plain = not line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{")
            if plain and (len(card.fields) != 1 or card.type == "multiple_choice"):
                raise UsageError(
                    f"plain text cannot be given to task '{card.task}', which has the fields "
                    f"{', '.join(card.fields)}: write each line as a JSON object with them"
                )
        if not plain:
            yield from json_lines([line], name, FirstFault(), first=number)
            continue
        try:
            yield number, {card.fields[0]: line.decode("utf-8-sig").strip()}
        except UnicodeDecodeError:
            yield from json_lines([line], name, FirstFault(), first=number)  # it says what is wrong
    if plain is None:
        raise FormatError("nothing to label; expected a text, or a JSON object, on each line", path=name)


def _lines(
    card: TaskCard, records: Records, name: str, names: Mapping[str, str], keep: Sequence[str] | None
) -> Iterator[_Line]:
    """Yield the lines of records; ``names`` are the data's for the card's keys, ``keep`` the columns to copy.

    ``keep`` None: all of them. Raises ``FormatError`` for a bad line.
    """
    columns = Columns(card, names)
    needed = (
        card.fields if card.type == "classification" else ("context",) if card.type == "extraction" else ()
    )
    begun = False
    for number, row in records:
        if row is None:
            yield _Line(None, "empty line", {})
            continue
        kept: dict[str, Any] = {}
        if isinstance(row, dict):
            missing = [column for column in keep or () if column not in row]
            if missing and not begun:
                raise FormatError(
                    f"has no {missing[0]!r} to keep, only {shown(list(row), 200)}", path=name, line=number
                )
            kept = dict(row) if keep is None else {column: row.get(column) for column in keep}
            begun = True
            if not any(value not in (None, "") for value in row.values()):
                yield _Line(None, "empty line", kept)
                continue
        record = columns(row)
        if isinstance(record, dict):  # what is to be found may be there, empty or of other labels
            record = {key: value for key, value in record.items() if key not in ("label", "answers")}
        empty = [key for key in needed if isinstance(record, dict) and _is_blank(record.get(key))]
        if empty:
            yield _Line(None, f"{', '.join(empty)} is empty", kept)
            continue
        example = RecordParser(card, name, number, FirstFault(), False).example(record)
        yield _Line(example, None, kept)


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and is_blank(value)


def _computed_with(config: BbtConfig, runtime: str, precision: str, device: str) -> BbtConfig:
    engine = None if runtime == "torch" else config.engine
    return replace(config, runtime=runtime, precision=precision, device=device, engine=engine, endpoint=None)


def _load_here(config: BbtConfig, note: Callable[[str], None]) -> FrozenModel:
    """The run's model, on what it was computed with or, where that is not here, on torch."""
    try:
        if config.endpoint is not None:
            raise MissingDependencyError(f"{config.endpoint} tunes; new text is labelled here")
        return load_model(config)
    except MissingDependencyError as error:
        model = load_model(_computed_with(config, "torch", "auto", "auto"))
        here = f"{model.backend.name}, {model.backend.precision}, {model.backend.device}"
        note(f"the run computed with {config.runtime}, {config.precision}, {config.device}: {error}")
        note(f"labelling with {here} instead; probabilities may differ in their last digits")
        return model


def predict_file(
    run_dir: Path, source: str, stdin: Iterable[bytes], keep: Sequence[str] = (), **options: Any
) -> Iterator[dict[str, Any]]:
    """Predictions for a file, or for ``stdin`` if the source is ``-``; ``options`` as of `Predictor`.

    A CSV or TSV file gives all of its columns beside them; of other input ``keep`` names what is kept.
    """
    if source == "-":
        yield from Predictor(run_dir, **options).predict_lines(stdin, "<stdin>", keep)
        return
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"there is no file {source}; --input takes a file of lines, or - for standard input")
    check_no_workbook(path, "--input")
    check_file(path)
    predictor = Predictor(run_dir, **options)
    if not is_lines(path):
        yield from predictor.predict_table(path, None if ending(path) in TABLES else keep)
        return
    with path.open("rb") as file:
        yield from predictor.predict_lines(file, source, keep)
