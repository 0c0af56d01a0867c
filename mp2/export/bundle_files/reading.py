"""Text to the graph's inputs, and its outputs to answers: numpy and tokenizers alone.

Every bundle has this file; its run.py and the server ``mp2 serve`` read through it. A line is a dictionary of
the task's fields (and ``options``, for multiple choice). N rows, T tokens.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

Task = dict[str, Any]  # what tasks/NAME.json holds, its tensors as "tensors", and its n-grams' places
OUTPUTS = {"span": ["start_logits", "end_logits"], "mlm": ["word_log_probs"], "ridge": ["pooled"]}  # by head
TYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}


class Row(NamedTuple):
    """One sequence of a line.

    An extraction task has one for each window over its context, head mlm one for each length of label word.
    """

    ids: np.ndarray  # [T]
    spans: np.ndarray  # [n, 2], first and last token of each option (extraction: of the context; head ridge:
    # of each field; head mlm: of each [MASK])
    text: str = ""  # the context
    offsets: Sequence[tuple[int, int]] = ()  # of the context's tokens, in its characters


def load(
    folder: Path, read: Callable[[str], bytes] | None = None
) -> tuple[tokenizers.Tokenizer, dict[str, Task]]:
    """Return the tokenizer of a bundle, and its tasks by name; ``read`` gives the bytes of a file."""
    read = read or (lambda name: (folder / name).read_bytes())
    tokenizer, tasks = tokenizers.Tokenizer.from_buffer(read("tokenizer.json")), {}
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
    for name, entry in json.loads((folder / "manifest.json").read_text("utf-8"))["tasks"].items():
        card = json.loads(read(entry["card"]))
        tensors = read_tensors(read(entry["tensors"]))
        ngrams = {tuple(x[x >= 0].tolist()): k for k, x in enumerate(tensors.get("ridge_ngrams", ()))}
        tasks[name] = {**card, "tensors": tensors, "ngrams": ngrams}
    return tokenizer, tasks


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file."""
    size = 8 + int.from_bytes(data[:8], "little")
    header, data = json.loads(data[8:size]), data[size:]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*x["data_offsets"])], TYPES[x["dtype"]]).reshape(x["shape"])
        for name, x in header.items()
    }


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
    if task["head"] == "ridge":
        return [_row(task, cut(ids, task["room"]), ())]
    if task["head"] == "mlm":
        lengths = sorted({len(x["ids"]) for x in task["options"]})
        kept = cut(ids, task["room"])
        return [_row(task, {**kept, "label": [task["mask"]] * n}, ()) for n in lengths]
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
    heads = [task["head"] for task in tasks]
    tasks = tasks[:1] if all(task is tasks[0] for task in tasks) else tasks
    inputs = [name for name in tasks[0]["tensors"] if not name.startswith("ridge_")]
    made = {name: stack([task["tensors"][name] for task in tasks]) for name in inputs}
    made |= {
        "input_ids": stack([x.ids for x in rows]),
        "attention_mask": stack([np.ones_like(x.ids) for x in rows]),
    }
    made["prompt_length"] = np.array([task["prompt_length"] for task in tasks], np.int64)
    nothing = np.zeros((1, 2), np.int64)  # is pooled for the span head
    segments = [nothing if head == "span" else row.spans for head, row in zip(heads, rows, strict=True)]
    return made | {"segments": stack(segments)}


def stack(arrays: list[np.ndarray]) -> np.ndarray:
    """Return arrays as one; the axis of tokens, rows or segments (last but one, or only one) is filled up."""
    axis, shape = max(arrays[0].ndim - 2, 0), list(arrays[0].shape)
    shape[axis] = max(x.shape[axis] for x in arrays)
    made = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for row, x in zip(made, arrays, strict=True):
        row[(slice(None),) * axis + (slice(x.shape[axis]),)] = x
    return made


def outputs(tasks: list[Task]) -> list[str]:
    """Return the names of the outputs that the tasks' answers are made of."""
    heads = {task["head"] for task in tasks}
    return [name for head, names in OUTPUTS.items() if head in heads for name in names]


def answer(
    task: Task, line: dict[str, Any], rows: list[Row], found: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Return the answer to a line and its probability; ``found`` are the outputs of each of its rows.

    The probability is NaN where these are no numbers.
    """
    if task["type"] == "extraction":
        return _extracted(task, rows, found)
    several = [SCORES[task["head"]](task, row, x) for row, x in zip(rows, found, strict=True)]
    scores = np.max(several, axis=0) / task["temperature"]
    best = int(scores.argmax())
    chosen = (
        {"label": task["options"][best]["label"]}
        if task["options"]
        else {"label": best, "option": line["options"][best]}
    )
    return chosen | {"probability": float(1 / np.exp(scores - scores[best]).sum())}


def span_scores(task: Task, row: Row, x: dict[str, np.ndarray]) -> np.ndarray:
    """Log-scores of the options: of each span's first token as a start and its last as an end."""
    starts, ends = x["start_logits"][row.spans[:, 0]], x["end_logits"][row.spans[:, 1]]
    return np.asarray(starts.astype(float) + ends)


def word_scores(task: Task, row: Row, x: dict[str, np.ndarray]) -> np.ndarray:
    """Mean log-probabilities of the label words' tokens at the [MASK]s; -inf for words of another length."""
    words, n = [option["ids"] for option in task["options"]], len(row.spans)
    at = x["word_log_probs"][np.arange(n)].astype(float)
    return np.array([at[np.arange(n), word].mean() if len(word) == n else -np.inf for word in words])


def ridge_scores(task: Task, row: Row, x: dict[str, np.ndarray]) -> np.ndarray:
    """Scores of the labels: linear in the fields' mean states at one layer, and in their n-grams' TF-IDF."""
    tensors = task["tensors"]
    means = x["pooled"][: len(row.spans), task["layer"]].astype(float)
    states = [means.ravel(), *([_compared(*means)] if len(means) == 2 else [])]
    scores = np.concatenate(states) @ tensors["ridge_state_weight"] + tensors["ridge_bias"]
    if "ridge_ngrams" in tensors:
        texts = [_ngram_row(task, row.ids[first : last + 1].tolist()) for first, last in row.spans]
        scores += (_compared(*texts) if len(texts) == 2 else sum(texts)) @ tensors["ridge_ngram_weight"]
    return np.asarray(task["scale"] * scores)


SCORES = {"span": span_scores, "mlm": word_scores, "ridge": ridge_scores}


def _compared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([np.abs(a - b), a * b])


def _ngram_row(task: Task, ids: list[int]) -> np.ndarray:
    """TF-IDF [G] of a text's n-grams of 1 to 3 tokens, of length 1."""
    row = np.zeros(len(task["ngrams"]))
    for n in (1, 2, 3):
        for i in range(len(ids) - n + 1):
            if (k := task["ngrams"].get(tuple(ids[i : i + n]))) is not None:
                row[k] += task["tensors"]["ridge_idf"][k]
    return np.asarray(row / (np.sqrt(row @ row) or 1.0))


def _row(task: Task, texts: dict[str, list[int]], options: Any, text: str = "", offsets: Any = ()) -> Row:
    whole = task["fields"] if task["head"] == "ridge" else ["context"] * (task["type"] == "extraction")
    ids, spans = list(task["before"]), []
    for part in task["parts"]:  # template text, and what follows it
        ids += part["ids"]
        own = texts.get(part["field"], [])
        if part["field"] == "label":  # [MASK]
            spans += [(k, k) for k in range(len(ids), len(ids) + len(own))]
        elif part["field"] in whole:
            spans.append((len(ids), len(ids) + len(own) - 1))
        ids += own
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
    best, text, span = -np.inf, "", (0, 0, 0)  # of the best span: its row, first and last token
    logits = [
        [x[name].astype(float)[: len(row.ids)] for name in OUTPUTS["span"]]
        for row, x in zip(rows, found, strict=True)
    ]
    if not all(np.isfinite(x).all() for pair in logits for x in pair):  # in any window
        return {"answer": "", "probability": float("nan")}
    at_cls = [sum(_log_softmax(x)[0] for x in pair) for pair in logits]
    for k, row in enumerate(rows):
        first, last = row.spans[0]
        start, end = (_log_softmax(x)[first : last + 1] for x in logits[k])
        for extra in range(min(task["max_answer_tokens"], len(start))):  # ties go to the shortest
            scores = start[: len(start) - extra] + end[extra:]
            at = int(scores.argmax())
            if scores[at] > best:
                best, span = scores[at], (k, first + at, first + at + extra)
                text = row.text[row.offsets[at][0] : row.offsets[at + extra][1]]
    if not text or (task["unanswerable"] and min(at_cls) > best):
        text, span = "", (int(np.argmin(at_cls)), 0, 0)
    start, end = (_log_softmax(x / task["temperature"]) for x in logits[span[0]])
    return {"answer": text, "probability": float(np.exp(start[span[1]] + end[span[2]]))}


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(float)
    return np.asarray(x - x.max() - np.log(np.exp(x - x.max()).sum()))
