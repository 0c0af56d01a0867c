"""A first task card from a data file, to be edited: what ``mp2 tasks new`` writes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp2.errors import UsageError, shown
from mp2.tasks.card_rules import TASK_NAME, TASK_NAME_RULE
from mp2.tasks.faults import FirstFault
from mp2.tasks.place import data_set, files_of
from mp2.tasks.record import is_blank, written
from mp2.tasks.record_files import TABLES, class_names, ending, read_records

MAX_LABELS = 200  # more values than that are no set of labels

_LABEL_NAMES = (
    "label",
    "labels",
    "label_desc",
    "label_des",
    "category",
    "class",
    "target",
    "tag",
    "y",
    "标签",
    "类别",
)
_OPTION_NAMES = ("options", "choices", "choice", "candidates")
_ANSWER_NAMES = ("answers", "answer")
_CONTEXT_NAMES = ("context", "passage", "content", "article", "text", "document")
_QUESTION_NAMES = ("question", "query")
_IGNORED = re.compile(r"(.*[_.])?(id|idx|index|guid|uid)|编号|序号", re.IGNORECASE)
_FEW_VALUES = 1 / 3  # of the rows: a column of short texts that has no more is a category, no text
_SHORT = 20  # characters
_MAY_BE_EMPTY = 0.05  # of the rows of a column of texts


@dataclass(frozen=True)
class NewCard:
    """The text of a card, and what was found in the data in words."""

    task: str
    text: str
    found: tuple[str, ...]


def new_card(path: Path, task: str | None = None) -> NewCard:
    """Propose a card for a data file or set: type, columns, a template and, for classification, the labels.

    Raises ``UsageError`` where no label, options or answers are found, or for a ``task`` that no card may be
    called; ``FormatError`` at a line that is bad.
    """
    if task is not None and not TASK_NAME.fullmatch(task):
        raise UsageError(f"--name is {shown(task)}, expected {TASK_NAME_RULE}")
    if place := data_set(path):
        from mp2.tasks.hub import training_rows

        rows, classes = training_rows(place)
        path = Path(place.name)
    elif path.is_file():
        rows = [row for _, row in read_records(path, FirstFault()) if isinstance(row, dict)]
        classes = class_names(path)
    else:
        raise UsageError(
            f"there is no file {path}; give a data file: .jsonl, .json, .csv, .tsv or .parquet, the "
            "folder of one that is called train, or hub:NAME for a set that datasets loads"
        )
    for column, names in classes.items():
        for row in rows:
            if isinstance(number := row.get(column), int) and 0 <= number < len(names):
                row[column] = names[number]
    if not rows:
        raise UsageError(f"{path} has no records; expected an object, or a row of a table, for each example")
    name = task or _task_name(path)
    columns = [str(column) for column in rows[0]]
    if options := _first(columns, _OPTION_NAMES):
        return _choice(name, columns, options)
    answers = _first(columns, _ANSWER_NAMES)
    if answers and (context := _first(columns, _CONTEXT_NAMES)) and not _first(columns, _LABEL_NAMES):
        return _extraction(name, columns, context, answers, rows)
    return _classification(name, path, rows)


def training_file(path: Path) -> Path:
    """Return the file itself or, of a folder, its training file."""
    return files_of(path).by_split.get("train", path) if path.is_dir() else path


def test_file_beside(path: Path) -> Path | None:
    """Return a file of test examples beside a data file that is not called train, and is read alone."""
    found = path.with_name(f"test{path.suffix}")
    return found if "train" not in path.stem and found.is_file() and found != path else None


def _task_name(path: Path) -> str:
    stem = path.parent.name if path.stem.startswith("train") else path.stem
    name = re.sub(r"[^a-z0-9_]+", "_", stem.lower()).lstrip("_0123456789")[:64].rstrip("_")
    return name or "my_task"


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {column.lower(): column for column in columns}
    return next((lower[name] for name in names if name in lower), None)


def _choice(task: str, columns: Sequence[str], options: str) -> NewCard:
    label = _first(columns, (*_LABEL_NAMES, *_ANSWER_NAMES)) or "label"
    context = _first([c for c in columns if c != options], _CONTEXT_NAMES)
    question = _first(columns, _QUESTION_NAMES)
    fields = {"options": options, "label": label}
    parts = []
    for key, column, part in (
        ("context", context, "文档：“{context}”"),
        ("question", question, "问题：“{question}”"),
    ):
        if column:
            fields[key] = column
            parts.append(part)
    if not parts:
        raise UsageError(f"options are in '{options}', but no column with a text or a question was found")
    template = "，".join([*parts, "选项：{options}"])
    text = _card(task, "multiple_choice", template, "accuracy", {}, fields)
    return NewCard(task, text, (f"multiple choice: options in '{options}', the right one in '{label}'",))


def _extraction(
    task: str, columns: Sequence[str], context: str, answers: str, rows: Sequence[dict[str, Any]]
) -> NewCard:
    fields = {"context": context, "answers": answers}
    template = "文档：“{context}”，答案是？"
    if question := _first(columns, _QUESTION_NAMES):
        fields["question"] = question
        template = "文档：“{context}”，问题：“{question}”，答案是？"
    none = sum(not row.get(answers) or row[answers] == "[]" for row in rows)
    extra = "unanswerable = true                # some questions have no answer\n" if none else ""
    found = [f"extraction: answers in '{answers}' are spans of '{context}'"]
    found += [f"{none} of {len(rows)} questions have no answer"] if none else []
    return NewCard(task, _card(task, "extraction", template, "f1", {}, fields, extra), tuple(found))


def _classification(task: str, path: Path, rows: Sequence[dict[str, Any]]) -> NewCard:
    rows = [_flat(row) for row in rows]
    columns = list(rows[0])
    label = _label_column(path, columns, rows)
    counts = Counter(str(written(row[label])) for row in rows if row.get(label) not in (None, ""))
    if ending(path) in TABLES and label in counts and label.lower() not in _LABEL_NAMES:
        raise UsageError(
            f"{path}: the first line is an example ('{label}' is in later lines too), expected the names of "
            "the columns; put them above it, as in text,label"
        )
    others = [column for column in columns if column != label and column.lower() not in _LABEL_NAMES]
    texts, left_out = _texts(others, rows)
    if not texts:
        raise UsageError(f"{path}: no column of texts beside '{label}'; expected at least one")
    keys = ["text"] if len(texts) == 1 else [f"text{i}" for i in range(1, len(texts) + 1)]
    fields = {**dict(zip(keys, texts, strict=True)), "label": label}
    shown = "和".join(f"“{{{key}}}”" for key in keys)
    template = (
        f"文本分类：{shown}的类别是？选项：{{options}}"
        if len(keys) == 1
        else f"{shown}的关系是？选项：{{options}}"
    )
    numbers = all(re.fullmatch(r"-?\d+", value) for value in counts)
    order = sorted(counts, key=int) if numbers else sorted(counts)
    words = {value: value for value in order}
    found = [
        f"classification: {len(counts)} labels in '{label}', texts in "
        + ", ".join(f"'{column}'" for column in texts),
        *(f"  {value}: {counts[value]} examples" for value in order[:20]),
    ]
    if left_out:
        names = ", ".join(f"'{column}' ({why})" for column, why in left_out.items())
        found.append(f"left out: {names}; what shall be read is named in template and [source.fields]")
    if numbers and (named := _names_of(label, columns, rows)):
        column, words = named[0], {value: named[1][value] for value in order}
        found.append(f"the labels are numbers: the words for them are those of '{column}'")
    elif numbers:
        words = {value: f"类别{value}" for value in order}
        found.append("the labels are numbers: write in [labels] what each of them means")
    return NewCard(task, _card(task, "classification", template, "accuracy", words, fields), tuple(found))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose objects are columns of their own: ``target.name``."""
    flat: dict[str, Any] = {}
    for column, value in row.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{column}.{key}": part for key, part in inner} or {str(column): value}
    return flat


def _texts(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Return the columns that have a text to read, and why others that have one are left out."""
    texts, left_out = [], {}
    for column in columns:
        values = [_one_text(row.get(column)) for row in rows]
        said = [value for value in values if value is not None and not is_blank(value)]
        if all(re.fullmatch(r"\s*[\d.]*\s*", value) for value in said):  # numbers, or nothing
            continue
        n_empty = len(values) - len(said)
        if _IGNORED.fullmatch(column):
            left_out[column] = "a number or name of the example"
        elif n_empty > _MAY_BE_EMPTY * len(rows):
            left_out[column] = f"empty in {n_empty} of {len(rows)}"
        elif len(set(said)) <= _FEW_VALUES * len(rows) and max(map(len, said)) <= _SHORT:
            left_out[column] = f"{len(set(said))} values"
        else:
            texts.append(column)
    usable = [column for column, why in left_out.items() if not _IGNORED.fullmatch(column)]
    if not texts and usable:
        texts = [max(usable, key=lambda column: sum(bool(_one_text(row.get(column))) for row in rows))]
        del left_out[texts[0]]
    return texts, left_out


def _one_text(value: Any) -> str | None:
    """Return a text, or a list of texts as one."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    return value if isinstance(value, str) else None


def _names_of(
    label: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]
) -> tuple[str, dict[str, str]] | None:
    """Return the column called like a label that has a word for each number of the label, and these words."""
    for column in columns:
        if column == label or column.lower() not in _LABEL_NAMES:
            continue
        pairs = {(str(written(row.get(label))), str(row.get(column) or "").strip()) for row in rows}
        words = {number: word for number, word in pairs if number != "None"}
        if len(pairs) == len(words) == len(set(words.values())) and all(words.values()):
            return column, words
    return None


def _label_column(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Return the column named as a label, else the one of fewest values, each of which repeats."""
    named = _first(columns, _LABEL_NAMES)
    found: dict[str, int] = {}
    for column in columns:
        values = [written(row.get(column)) for row in rows]
        n = len(set(map(str, values)))
        if all(isinstance(value, str) for value in values) and 2 <= n <= min(MAX_LABELS, len(rows) // 2):
            found[column] = n
    if named in found:
        return str(named)
    if not found:
        raise UsageError(
            f"{path}: no column looks like labels (2 to {MAX_LABELS} values that repeat); it has "
            f"{', '.join(columns)}"
        )
    return min(found, key=lambda column: found[column])


def _card(
    task: str,
    kind: str,
    template: str,
    metric: str,
    labels: dict[str, str],
    fields: dict[str, str],
    extra: str = "",
) -> str:
    lines = [
        f'task = "{task}"',
        f'family = "{kind.replace("_", " ")}"            # what kind of task: edit',
        f'type = "{kind}"',
        f"template = {_toml(template)}   # what the model reads: edit",
        f'metric = "{metric}"',
        'track = "extra"',
        "version = 1                        # raise it when template or labels change",
    ]
    text = "\n".join(lines) + "\n" + extra
    if labels:
        text += "\n[labels]                           # label in the data = the word shown for it: edit\n"
        text += "".join(f"{_toml(raw)} = {_toml(word)}\n" for raw, word in labels.items())
    renamed = {key: column for key, column in fields.items() if key != column}
    if renamed:
        text += "\n[source.fields]                    # our name = the column of the data\n"
        text += "".join(f"{key} = {_toml(column)}\n" for key, column in renamed.items())
    return text


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
