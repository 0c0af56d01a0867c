"""Reading comprehension without labels: tasks cut out of plain text, for a backbone that prompts can steer.

A small masked language model cannot be told by prompts what to look for, and a backbone trained on labelled
tasks does them by itself, whatever the prompts say. Between the two lie tasks that plain text sets by itself.
They have the form of every other task here (a card and JSON lines), so ``mp2 pretrain --backbone-lr`` trains
on them; several share text, options and template and differ in what is asked: only the prompts can say that.

=============== ==========================================================================================
word_missing    which option was deleted from the text (a word typical of it)
word_present    which option stands in the text (the same inputs as word_missing)
word_next       the option after the deleted one (the same inputs)
word_common     the option that is the commonest word of the corpus (the same inputs)
polar           which of two evaluative words of opposite sense goes with a text whose own one was deleted
polar_opposite  the other one (the same inputs)
follows         which option continues the text
follows_not     which option does not: two continue it, one is from elsewhere
same            do two pieces come from one document? Options such as yes and no, in either order
same_opposite   the other answer (the same inputs)
edited          is the second sentence the first one with a few characters dropped, doubled or exchanged?
recurring       a phrase of one sentence that fills the gap in another one of the same document (extraction),
                after recurring span selection (Ram et al. 2021)
=============== ==========================================================================================

Words are character pairs that stick together (normalised pointwise mutual information) and are neither rare
nor everywhere; evaluative words come from the list ``POLAR_WORDS``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mp2.errors import UsageError
from mp2.limits import check_new_folder, check_seed
from mp2.training.corpus import corpus_files
from mp2.training.corpus_words import Words, documents, find_words
from mp2.training.pseudo_examples import Maker

_TEMPLATES = {
    "word": "选词：“{context}”，选项：{options}",
    "polar": "评价：“{context}”，选项：{options}",
    "follows": "接续：“{context}”，选项：{options}",
    "pair": "比较：“{context}”和“{question}”，选项：{options}",
    "recurring": "填空：“{context}”，“{question}”",
}
_FAMILIES = {  # task -> (template, type)
    "word_missing": "word",
    "word_present": "word",
    "word_next": "word",
    "word_common": "word",
    "polar": "polar",
    "polar_opposite": "polar",
    "follows": "follows",
    "follows_not": "follows",
    "same": "pair",
    "same_opposite": "pair",
    "edited": "pair",
    "recurring": "recurring",
}
PSEUDO_TASKS = tuple(_FAMILIES)
_PASSES = 20  # over the documents: each draws other pieces of them
_DEV_SHARE = 0.05  # of the documents, at least: some tasks find an example in few of them


def card_text(task: str) -> str:
    """The TOML card of a pseudo-task."""
    family = _FAMILIES[task]
    kind = "extraction" if family == "recurring" else "multiple_choice"
    metric = "f1" if kind == "extraction" else "accuracy"
    return (
        f'task = "{task}"\nfamily = "self-supervised {family}"\ntype = "{kind}"\n'
        f'template = "{_TEMPLATES[family]}"\nmetric = "{metric}"\ntrack = "extra"\nversion = 1\n'
    )


def make_pseudo_tasks(
    corpus: Path,
    out: Path,
    *,
    examples: int,
    dev: int,
    seed: int,
    files: int | None,
    log: Callable[[str], None],
) -> dict[str, int]:
    """Write every pseudo-task's card and ``{train,dev}.jsonl`` to ``out``; returns training examples by task.

    At most ``examples`` training and ``dev`` dev examples a task, from the first ``files`` files of the
    corpus (all if None); what a task lacks is said. A document is used for one of the splits alone, and no
    input comes twice. The folder appears whole or not at all.

    Raises:
        UsageError: ``out`` exists, no corpus file, or too little text.
    """
    for option, number in (("--examples", examples), ("--dev", dev), ("--files", files)):
        if number is not None and number < 1:
            raise UsageError(f"{option} {number}: expected at least 1")
    check_seed(seed)
    check_new_folder(out)
    if out.exists():
        raise UsageError(f"{out} exists; give a new folder")
    texts = [d for d in documents(corpus_files(corpus)[:files]) if d]
    words = find_words(texts)
    log(f"{len(texts):,} documents, {len(words.documents):,} words")
    rng = np.random.default_rng([seed, 11])
    order = rng.permutation(len(texts))
    n_dev = math.ceil(len(texts) * max(_DEV_SHARE, dev / (dev + examples)))
    seen: set[tuple[str, bytes]] = set()
    kept = {
        split: _cut([texts[i] for i in part], words, rng, wanted, seen)
        for split, part, wanted in (("dev", order[:n_dev], dev), ("train", order[n_dev:], examples))
    }
    short = [task for task in PSEUDO_TASKS if not (kept["dev"][task] and kept["train"][task])]
    if short:
        raise UsageError(f"the corpus gives too few examples of {', '.join(short)}; give more text")
    for task in PSEUDO_TASKS:
        n = {split: len(lines[task]) for split, lines in kept.items()}
        if n != {"dev": dev, "train": examples}:
            log(f"{task}: {n['train']:,} of {examples:,} training, {n['dev']:,} of {dev:,} dev examples")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for task in PSEUDO_TASKS:
        (part / task).mkdir(parents=True)
        (part / f"{task}.toml").write_text(card_text(task), encoding="utf-8")
        for split, lines in kept.items():
            (part / task / f"{split}.jsonl").write_text("\n".join(lines[task]) + "\n", encoding="utf-8")
    os.replace(part, out)
    return {task: len(lines) for task, lines in kept["train"].items()}


def _cut(
    texts: Sequence[Sequence[str]],
    words: Words,
    rng: np.random.Generator,
    wanted: int,
    seen: set[tuple[str, bytes]],
) -> dict[str, list[str]]:
    """At most ``wanted`` records (JSON lines) of each task whose inputs were not ``seen`` yet.

    Compared by input, not by record: tasks that share their inputs then leave out the same ones and stay
    twins, and no input comes with two answers.
    """
    maker = Maker(texts, words, rng)
    kept: dict[str, list[str]] = {task: [] for task in PSEUDO_TASKS}
    for _ in range(_PASSES):
        for sentences in texts:
            for task, record in maker.examples(sentences):
                if len(kept[task]) == wanted:
                    continue
                asked = repr([record["context"], record["question"], record.get("options")])
                key = task, hashlib.sha256(asked.encode()).digest()
                if key not in seen:
                    seen.add(key)
                    kept[task].append(json.dumps(record, ensure_ascii=False))
        if all(len(lines) == wanted for lines in kept.values()):
            break
    return kept
