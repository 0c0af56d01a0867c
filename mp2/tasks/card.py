"""Task cards: the TOML files that define a task, strictly validated.

::

    card = load_card("tnews")            # a card of the package
    card = load_card("my/reviews.toml")  # a user's own

A card says how an example is written out as a reading-comprehension input (``template``), which raw labels
there are and the words shown for them (``labels``), and where the data lies on the Hugging Face hub
(``source``). The rules are in :mod:`mp2.tasks.card_rules`, examples in ``mp2/tasks/cards``.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from mp2.errors import UnknownNameError, UsageError
from mp2.tasks.card_rules import DEFAULT_HUB_SPLITS, DEFAULT_MAX_ANSWER_TOKENS, CardRules, template_parts
from mp2.tasks.encodings import not_utf8
from mp2.tasks.faults import Faults, FirstFault
from mp2.text_files import check_file

CARDS_DIR = Path(__file__).parent / "cards"


@dataclass(frozen=True)
class Source:
    """Where a task's public data lies, and how it names things.

    Either a data set of the Hugging Face hub (``hub``, ``config``, ``splits``: ours to the hub's) or
    ``files``: our split to an address, ``#`` before the name in an archive, several with spaces. ``format``,
    ``columns`` and ``separator`` are of such files (:mod:`mp2.tasks.source_formats`), ``digests`` their
    checksums by split or for ``all``. ``page`` is where people look, ``note`` what they should know.

    ``fields`` maps our field to the source's column (``a.b`` reaches into a nested column), ``labels`` its
    label to the card's raw label; ``join`` joins a column that is a list of strings. ``held_out`` is the
    share of train that becomes test where the source has no labelled one, ``counts`` the examples expected by
    split. ``confirmed`` says that address and format were found in public code or an index; false: nobody of
    us has seen them.
    """

    hub: str | None = None
    config: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_HUB_SPLITS))
    labels: dict[str, str] = field(default_factory=dict)
    join: str = " "
    files: dict[str, str] = field(default_factory=dict)
    format: str = ""
    columns: str = ""
    separator: str = "\t"
    digests: dict[str, str] = field(default_factory=dict)
    held_out: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    page: str = ""
    licence: str = ""
    note: str = ""
    confirmed: bool = False


@dataclass(frozen=True)
class TaskCard:
    """A task: how to write its examples out, its labels, its metric, its source.

    ``labels`` maps raw labels to the words shown in the options, in that order; it is empty unless the type
    is classification. ``unanswerable`` allows extraction questions without an answer.
    """

    task: str
    family: str
    type: str
    template: str
    metric: str
    shots_per_label: int | None
    track: str
    version: int
    labels: dict[str, str]
    source: Source | None
    path: Path
    unanswerable: bool = False
    max_answer_tokens: int = DEFAULT_MAX_ANSWER_TOKENS
    cloze: str | None = None  # for the masked-language-model head: fields, {label}; {options} of choice

    @cached_property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """The template as (literal text, name of the field that follows it or None)."""
        return template_parts(self.template)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The data fields that the template shows, in order, without ``options``."""
        return tuple(name for _, name in self.parts if name is not None and name != "options")

    @cached_property
    def gold_keys(self) -> tuple[str, ...]:
        """The data keys beside the fields: the label or the answers, and the options of multiple choice."""
        keys = {
            "classification": ("label",),
            "extraction": ("answers",),
            "multiple_choice": ("options", "label"),
        }
        return keys[self.type]


def card_names() -> list[str]:
    """Return the names of the package's cards, sorted."""
    return sorted(path.stem for path in CARDS_DIR.glob("*.toml"))


def list_cards() -> list[TaskCard]:
    """Return the package's cards, sorted by name."""
    return [load_card(name) for name in card_names()]


def load_card(name_or_path: str | Path) -> TaskCard:
    """Return the card named (one of the package) or the card in the file given.

    Raises ``UnknownNameError`` with the nearest names, or ``FormatError`` (file, line, field, expected).
    """
    path = find_card(name_or_path)
    return _package_card(path.stem) if path.parent == CARDS_DIR else _read(path)


def find_card(name_or_path: str | Path) -> Path:
    """Return the file of a card; see :func:`load_card`."""
    text = str(name_or_path)
    path = Path(text)
    if path.suffix == ".toml" or "/" in text or "\\" in text:
        if not path.is_file():
            raise UsageError(
                f"there is no task card {text}; give a TOML file, or one of the names of 'mp2 tasks'"
            )
        return path
    names = card_names()
    if text not in names:
        hint = f"'mp2 tasks' lists all {len(names)}; your own card is given as a path."
        raise UnknownNameError("task", text, names, hint)
    return CARDS_DIR / f"{text}.toml"


@cache
def _package_card(name: str) -> TaskCard:
    return _read(CARDS_DIR / f"{name}.toml")


def _read(path: Path) -> TaskCard:
    card = read_card(path, FirstFault())
    assert card is not None  # FirstFault raised otherwise
    return card


def read_card(path: Path, faults: Faults) -> TaskCard | None:
    """Read and validate one card; report to ``faults`` and return None if there are any."""
    check_file(path)
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        faults.add(not_utf8(data, path, f" ({error.reason} at byte {error.start})"), path)
        return None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"at line (\d+)", str(error))
        faults.add(f"not TOML: {error}", path, line=int(where[1]) if where else None)
        return None
    except (
        ValueError,
        RecursionError,
    ) as error:  # of Python itself: an integer too long, or too many brackets
        faults.add(f"not TOML that can be read: {error}", path)
        return None
    rules = CardRules(path, text, faults)
    rules.check(raw)
    if rules.n_faults:
        return None
    source = raw.get("source")
    return TaskCard(
        task=raw["task"],
        family=raw["family"],
        type=raw["type"],
        template=raw["template"],
        metric=raw["metric"],
        shots_per_label=raw.get("shots_per_label"),
        track=raw["track"],
        version=raw["version"],
        labels=dict(raw.get("labels", {})),
        source=Source(**source) if source is not None else None,
        path=path,
        unanswerable=raw.get("unanswerable", False),
        max_answer_tokens=raw.get("max_answer_tokens", DEFAULT_MAX_ANSWER_TOKENS),
        cloze=raw.get("cloze"),
    )
