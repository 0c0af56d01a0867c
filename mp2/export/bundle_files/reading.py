"""Text to the graph's inputs, and its outputs to answers: numpy and tokenizers alone.

Every bundle has this file; its run.py and the server ``mp2 serve`` read through it. A line is a dictionary of
the task's fields (and ``options``, for multiple choice). N rows, T tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

Task = dict[str, Any]  # what tasks/NAME.json holds, and its tensors as "tensors"


class Row(NamedTuple):
    """One sequence of a line; a line of an extraction task has one for each window over its context."""

    ids: np.ndarray  # [T]
    spans: np.ndarray  # [n, 2], first and last token of each option, or (extraction) of the context
    text: str = ""  # the context
    offsets: Sequence[tuple[int, int]] = ()  # of the context's tokens, in its characters


def load(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Task]]:
    """Return the tokenizer of a bundle, and its tasks by name."""
    tokenizer, tasks = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), {}
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
    for name, entry in json.loads((folder / "manifest.json").read_text("utf-8"))["tasks"].items():
        card = json.loads((folder / entry["card"]).read_text("utf-8"))
        tasks[name] = {**card, "tensors": read_tensors(folder / entry["tensors"])}
    return tokenizer, tasks


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Return the float32 tensors of a safetensors file."""
    data = file.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header, data = json.loads(data[8:size]), data[size:]
    header.pop("__metadata__", None)
    flat = {name: np.frombuffer(data[slice(*x["data_offsets"])], "<f4") for name, x in header.items()}
    return {name: x.reshape(header[name]["shape"]) for name, x in flat.items()}


def rows(tokenizer: tokenizers.Tokenizer, task: Task, line: dict[str, Any]) -> list[Row]:
    """Return the sequences of a line; ValueError where its options leave no room for its text."""
    texts = {
        name: tokenizer.encode(line[name], add_special_tokens=False)
        for name in task["fields"]
        if task["type"] != "extraction" or name != "context"
    }
    ids = {name: x.ids for name, x in texts.items()}
    if task["type"] == "extraction":
        context = tokenizer.encode(line["context"], add_special_tokens=False)
        ids = cut(ids, task["room"] // 2)
        size = task["room"] - sum(map(len, ids.values()))
        return [
            _row(
                task,
                {**ids, "context": context.ids[first:last]},
                (),
                line["context"],
                context.offsets[first:last],
            )
            for first, last in _windows(len(context.ids), size, task["max_answer_tokens"])
        ]
    options = [x["ids"] for x in task["options"]]
    options = options or [tokenizer.encode(x, add_special_tokens=False).ids for x in line["options"]]
    room = task["room"] - sum(map(len, options)) - len(task["separator"]) * (len(options) - 1)
    if room < min(task["least_room"], sum(map(len, ids.values()))):
        raise ValueError(
            f"its options leave {room} tokens to its text, expected {task['least_room']}; shorten them"
        )
    return [_row(task, cut(ids, room), options)]


def cut(texts: dict[str, list[int]], room: int) -> dict[str, list[int]]:
    """Return the texts cut to ``room`` tokens in all: the longest give up their ends, down to one length.

    Those below that length stay whole; what rounding leaves over goes to the first of those that are cut.
    """
    kept, room = dict(texts), max(room, 0)
    longest = sorted(texts, key=lambda name: len(texts[name]))
    while longest and len(texts[longest[0]]) * len(longest) <= room:
        room -= len(texts[longest.pop(0)])
    for rank, name in enumerate(name for name in texts if name in longest):
        kept[name] = texts[name][: room // len(longest) + (rank < room % len(longest))]
    return kept


def feeds(tasks: list[Task], rows: list[Row]) -> dict[str, np.ndarray]:
    """Return the inputs for ``rows``, of the task at the same place each; one prompt where all share it."""
    tasks = tasks[:1] if all(task is tasks[0] for task in tasks) else tasks
    made = {name: stack([task["tensors"][name] for task in tasks]) for name in tasks[0]["tensors"]}
    made |= {
        "input_ids": stack([x.ids for x in rows]),
        "attention_mask": stack([np.ones_like(x.ids) for x in rows]),
    }
    made["prompt_length"] = np.array([task["prompt_length"] for task in tasks], np.int64)
    return made | {"segments": np.zeros((len(rows), 1, 2), np.int64)}  # nothing is pooled


def stack(arrays: list[np.ndarray]) -> np.ndarray:
    """Return arrays as one; the axis of tokens or prompt rows (last but one, or only one) is filled up."""
    axis = max(arrays[0].ndim - 2, 0)
    size = max(x.shape[axis] for x in arrays)
    return np.stack(
        [np.pad(x, [(0, (size - n) * (k == axis)) for k, n in enumerate(x.shape)]) for x in arrays]
    )


def outputs(tasks: list[Task]) -> list[str]:
    """Return the names of the outputs that the tasks' answers are made of."""
    return ["start_logits", "end_logits"]


def answer(
    task: Task, line: dict[str, Any], rows: list[Row], found: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Return the answer to a line and its probability; ``found`` are the outputs of each of its rows."""
    if task["type"] == "extraction":
        return _extracted(task, rows, found)
    (row,), (x,) = rows, found
    scores = x["start_logits"][row.spans[:, 0]].astype(float) + x["end_logits"][row.spans[:, 1]]
    best = int(scores.argmax())
    chosen = (
        {"label": task["options"][best]["label"]}
        if task["options"]
        else {"label": best, "option": line["options"][best]}
    )
    return chosen | {"probability": float(1 / np.exp(scores - scores[best]).sum())}


def _row(task: Task, texts: dict[str, list[int]], options: Any, text: str = "", offsets: Any = ()) -> Row:
    ids, spans = list(task["before"]), []
    for part in task["parts"]:  # template text, and what follows it
        ids += part["ids"]
        if part["field"] == "context" and not options:
            spans.append((len(ids), len(ids) + len(texts["context"]) - 1))
        ids += texts.get(part["field"], [])
        for k, option in enumerate(options if part["field"] == "options" else ()):
            spans.append((len(ids), len(ids) + max(len(option), 1) - 1))
            ids += option + task["separator" if k + 1 < len(options) else "closing"]
    return Row(np.array(ids + task["after"], np.int64), np.array(spans, np.int64), text, list(offsets))


def _windows(n_tokens: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Return [first, last) windows over the context that overlap by ``overlap``, or by half of them."""
    if n_tokens <= size:
        return [(0, n_tokens)]
    starts = [*range(0, n_tokens - size, size - min(overlap, size // 2)), n_tokens - size]
    return [(start, start + size) for start in starts]


def _extracted(task: Task, rows: list[Row], found: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    best, text, no_answer = -np.inf, "", np.inf
    for row, x in zip(rows, found, strict=True):
        start, end = (_log_softmax(x[name][: len(row.ids)]) for name in ("start_logits", "end_logits"))
        no_answer = min(no_answer, start[0] + end[0])
        first, last = row.spans[0]
        start, end = start[first : last + 1], end[first : last + 1]
        for extra in range(min(task["max_answer_tokens"], len(start))):  # ties go to the shortest
            scores = start[: len(start) - extra] + end[extra:]
            at = int(scores.argmax())
            if scores[at] > best:
                best, text = scores[at], row.text[row.offsets[at][0] : row.offsets[at + extra][1]]
    if not text or (task["unanswerable"] and no_answer > best):
        return {"answer": "", "probability": float(np.exp(no_answer))}
    return {"answer": text, "probability": float(np.exp(best))}


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(float)
    return np.asarray(x - x.max() - np.log(np.exp(x - x.max()).sum()))
