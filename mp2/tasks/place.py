"""Where a task's data lie: files of a folder, one training file and its neighbours, a set of ``datasets``.

``--data`` (or MP2_DATA) is one of

- a folder with ``<task>/train.*``, or with ``train.*`` itself; ``dev.*`` and ``test.*`` beside it
- a training file of any name; where it has ``train`` in it, dev and test are the files named alike
- a folder that ``datasets`` wrote (``save_to_disk``)
- ``hub:NAME[:CONFIG]``: a data set of the hub, or a folder, that ``datasets.load_dataset`` loads

Files end in .jsonl, .json, .csv, .tsv or .parquet. FewCLUE's folders work as they are: ``train_0.json`` and
``dev_0.json`` are taken, with ``test_public.json``; give ``--data .../train_3.json`` for another of its five
splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mp2.environment import data_folder
from mp2.errors import UsageError, shown
from mp2.tasks.card import TaskCard
from mp2.tasks.record_files import FORMATS, check_ending

DEMO_DIR = Path(__file__).parent / "demo"
HUB_PREFIX = "hub:"
_NAMES = {
    "train": ("train", "train_0"),
    "dev": ("dev", "valid", "validation", "dev_0"),
    "test": ("test_public", "test"),  # FewCLUE's test.json has no labels
}
_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Files:
    """The data files of a task by split; ``named`` is the folder or training file they were found by."""

    named: Path
    by_split: dict[str, Path]


@dataclass(frozen=True)
class DataSet:
    """A set that the library ``datasets`` loads: by name (``hub``), or from the folder it was saved in."""

    name: str
    config: str | None = None
    saved: bool = False


Place = Files | DataSet


def find_place(card: TaskCard, data: str | Path | None = None) -> Place | None:
    """Return where a task's data lie; None where only the card's own source is left to ask.

    Raises ``UsageError`` if a place was named that does not have the task.
    """
    root = data if data is not None else data_folder()
    demo = DEMO_DIR / card.task
    is_demo = card.task.startswith("demo_") and demo.is_dir()
    if not root:
        return files_of(demo) if is_demo else None
    given = "--data" if data is not None else "MP2_DATA"
    if str(root).startswith(HUB_PREFIX):
        return data_set(root, given)
    path = Path(root)
    if path.is_file():
        return _neighbours(path, given)
    if not path.is_dir():
        raise UsageError(f"{given}: there is no file or folder {root}")
    for folder in (path / card.task, path):
        if (saved := data_set(folder)) is not None:
            return saved
        if folder.is_dir() and (folder != path or files_of(path).by_split):
            return files_of(folder)
        if is_demo:
            return files_of(demo)
    raise UsageError(_no_folder(card, path, given))


def data_set(data: str | Path, given: str = "") -> DataSet | None:
    """Return the set that ``hub:NAME`` or a folder of ``datasets`` is; None for anything else.

    Raises ``UsageError`` for ``hub:`` without a name; ``given`` is the option that it was given with.
    """
    text = str(data)
    if text.startswith(HUB_PREFIX):
        name, _, config = text.removeprefix(HUB_PREFIX).partition(":")
        if not name:
            raise UsageError(f"{given} {text}: expected hub:NAME or hub:NAME:CONFIG".lstrip())
        return DataSet(name, config or None)
    if any((Path(data) / name).is_file() for name in _SAVED):
        return DataSet(text, saved=True)
    return None


def tasks_in(data: str | Path | None = None) -> set[str]:
    """Return the names of the task folders with training data in the data folder (``data`` or MP2_DATA).

    Raises ``UsageError`` where ``data`` is no folder.
    """
    root = data if data is not None else data_folder()
    if data is not None and not Path(data).is_dir():
        raise UsageError(f"--data: there is no folder {data}")
    if not root or not Path(root).is_dir():
        return set()
    return {
        path.name for path in Path(root).iterdir() if path.is_dir() and "train" in files_of(path).by_split
    }


def _no_folder(card: TaskCard, root: Path, given: str) -> str:
    deeper = sorted(p.parent for p in root.glob(f"*/{card.task}") if p.is_dir())
    if deeper:
        hint = "; did you mean " + " or ".join(f"--data {p}" for p in deeper[:3]) + "?"
    else:
        folders = sorted(p.name for p in root.iterdir() if p.is_dir())
        hint = f"; its folders: {shown(', '.join(folders), 200)}" if folders else "; it has no folders"
    if any(root.glob("*.parquet")) or any(root.glob("data/*.parquet")):
        hint += f"; a data set of the hub that was downloaded is read with {given} {HUB_PREFIX}{root}"
    folder = root / card.task
    return f"{given} {root} has no folder '{card.task}' (expected {folder}/train.jsonl){hint}"


def files_of(folder: Path) -> Files:
    """Return a folder's data files; raises ``UsageError`` where a split has two."""
    found: dict[str, Path] = {}
    there = {path.name for path in folder.iterdir()}  # some file systems find train.csv as train.CSV, too
    for split, names in _NAMES.items():
        for name in names:
            files = [name + case(ending) for ending in FORMATS for case in (str.lower, str.upper)]
            paths = [folder / file for file in files if file in there and (folder / file).exists()]
            if len(paths) > 1:
                both = " and ".join(path.name for path in paths)
                raise UsageError(
                    f"{folder} has {both}; keep one of them, or name the training file with --data"
                )
            if paths:
                found[split] = paths[0]
                break
    return Files(folder, found)


def _neighbours(train: Path, given: str) -> Files:
    """Return a training file with the dev and test files named like it."""
    check_ending(train, given)
    found = {"train": train}
    if "train" in train.stem:
        for split in ("dev", "test"):
            stems = [train.stem.replace("train", name) for name in ("dev", "valid", "validation")]
            if split == "test":
                stems = ["test_public", train.stem.replace("train", "test")]
            paths = [p for stem in stems if (p := train.with_name(stem + train.suffix)).is_file()]
            if paths:
                found[split] = paths[0]
    return Files(train, found)
