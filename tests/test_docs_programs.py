"""Programs that the documents show beside ``mp2``: benchmarks, make targets, recipes, extras of pip.

A benchmark's ``main`` is called up to where it reads its words; its own parser must accept them. Those that
take seconds at a small size are run at it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.paper.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
MODULES = sorted((ROOT / "benchmarks").rglob("*.py"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]

ANY = 99  # as many words as one likes
PLACEHOLDER = re.compile(r"[A-Z_]+")  # DIR, N: what the reader fills in


def lines(start: str) -> list[tuple[str, str]]:
    """(file, command) wherever a document, a recipe or a benchmark's docstring shows ``start ...``."""
    found = []
    for path in [*PAGES, *RECIPES, ROOT / ".ci" / "run", *MODULES]:
        text = path.read_text("utf-8")
        if path.suffix == ".py":
            text = inspect.cleandoc(docstring_of(text))
            text = re.sub(r"\n +(?=\[)", " ", text)  # the options go on in the next line
        text = text.replace("\\\n", " ")
        for command in re.findall(rf"(?:^ *|`| && )({start}[^`\n]*)", text, re.MULTILINE):
            shown = re.split(r"\s#|\s{3,}", command.strip())[0]
            found.append((str(path.relative_to(ROOT)), shown))
    return found


def docstring_of(source: str) -> str:
    """The docstring at the head of a module, which is not imported."""
    head = re.match(r'r?"""(.*?)"""', source, re.DOTALL)
    return head[1] if head else ""


def variants(line: str) -> Iterator[list[str]]:
    """The words of a shown line with all of its options; once for each of ``several|names``."""
    line = re.sub(r"\bOPTION\b", "--help", line)  # any options: the command itself must be there
    words = shlex.split(re.sub(r"[][]|\.\.\.", " ", line))
    names = words[3].split("|") if len(words) > 3 else []
    for name in names or [""]:
        yield [*words[:3], *([name] if name else []), *words[4:]]


class _ParsedError(Exception):
    """The words of a command were accepted."""


def accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise ``AssertionError`` where ``python -m MODULE WORD ...`` is no command, or refuses a word."""
    module, given = words[2], words[3:]
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    assert found is not None, f"there is no module {module}"
    if found.submodule_search_locations is not None:
        assert find_spec(f"{module}.__main__") is not None, f"{module} is a package that is no command"
    if module == "benchmarks.paper" and given and given[0] in COMMANDS:
        name, function = COMMANDS[given[0]]
        given = given[1:]
    else:
        assert module != "benchmarks.paper", f"no table or figure {given[:1]}"
        name, function = module, "main"
    command = getattr(import_module(name), function, None)
    assert command is not None, f"{name} has no {function}: it is no command"
    if "parse_args(" not in Path(str(import_module(name).__file__)).read_text("utf-8"):
        assert not given, f"{name} takes no words, got {given}"
        return

    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, words: list[str] | None = None) -> None:
        for action in self._actions:
            of_type, choices = action.type, action.choices
            if of_type is not None:
                action.type = lambda text, of=of_type: text if PLACEHOLDER.fullmatch(text) else of(text)
            if choices is not None and not isinstance(action, argparse._SubParsersAction):
                action.choices = [*choices, *(word for word in given if PLACEHOLDER.fullmatch(word))]
        parse(self, words)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *given])
    with pytest.raises((_ParsedError, SystemExit)) as stopped:
        command(given) if function != "main" else command()
    refused = isinstance(stopped.value, SystemExit) and stopped.value.code  # 0: --help
    assert not refused, f"{name} refuses {given}"


def target_exists(line: str) -> None:
    """Raise ``AssertionError`` where ``make NAME X=Y`` names a target or variable that is not there."""
    for word in shlex.split(line)[1:]:
        variable = re.fullmatch(r"(\w+)=.*", word)
        rule = rf"^{variable[1]}\s*\?=" if variable else rf"^{re.escape(word)}:"
        assert re.search(rule, MAKEFILE, re.MULTILINE), f"the Makefile has no {word}"


def usages(recipe: Path) -> dict[str, tuple[int, int]]:
    """Subcommand ("" for none): least and most words after it, by the comment at a recipe's head."""
    found = {}
    for usage in re.findall(rf"^#   recipes/{recipe.name}(.*)$", recipe.read_text("utf-8"), re.MULTILINE):
        words = re.split(r"\s{3,}", usage.strip())[0]
        names = re.sub(r"\[.*?\]", "", words).split()
        command = names.pop(0) if names and names[0].islower() else ""
        optional = len(re.findall(r"\[", words))
        found[command] = (len(names), ANY if "..." in words else len(names) + optional)
    return found


def recipe_takes(line: str) -> None:
    """Raise ``AssertionError`` where ``recipes/NAME.sh WORD ...`` is no recipe or takes other words."""
    name, *words = shlex.split(re.sub(r"[][]|\.\.\.", " ", line))
    recipe = ROOT / name
    assert recipe.is_file(), f"there is no {name}"
    if not words:  # the file is spoken of
        return
    known = usages(recipe)
    command = words.pop(0) if words[0] in known else ""
    assert command in known, f"{name} has no command {words[0]}; it has {sorted(known)}"
    least, most = known[command]
    assert least <= len(words) <= most, f"{name} {command} takes {least} to {most} words, got {words}"


def extras_exist(line: str) -> None:
    """Raise ``AssertionError`` where ``pip install`` names an extra of mp2 that it does not have."""
    for names in re.findall(r"(?:mp2|\.)\[([^\]]*)\]", line):
        assert set(names.split(",")) <= EXTRAS.keys(), f"mp2 has no extra {names}; it has {sorted(EXTRAS)}"


@pytest.mark.parametrize(("file", "line"), lines(r"python -m benchmarks\b"))
def test_a_shown_benchmark_exists_and_takes_its_words(
    file: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in variants(line):
        with monkeypatch.context() as patch:
            accepted(words, patch)


@pytest.mark.parametrize(("file", "line"), lines(r"make [a-z]"))
def test_a_shown_target_of_make_exists(file: str, line: str) -> None:
    target_exists(line)


@pytest.mark.parametrize(("file", "line"), lines(r"recipes/\w+\.sh"))
def test_a_shown_recipe_exists_and_takes_its_words(file: str, line: str) -> None:
    recipe_takes(line)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_takes(recipe: Path) -> None:
    """Its usage against the positional words that its code reads."""
    code = re.sub(r"^#.*$", "", recipe.read_text("utf-8"), flags=re.MULTILINE)
    one_line_function = r"\w+\(\) \{.*?\}$"  # has words of its own
    code = re.sub(one_line_function, "", code, flags=re.MULTILINE)
    known = usages(recipe)
    for command, (least, most) in known.items():
        body = code
        if command:
            (body,) = re.findall(rf"^{command}\(\) \{{\n(.*?)^\}}", code, re.MULTILINE | re.DOTALL)
        needed = {int(number) for number in re.findall(r"=\$(\d)", body)}
        extra = {int(number) for number in re.findall(r"=\$\{(\d):?-", body)}
        assert least == max(needed), (recipe.name, command)
        assert most == (ANY if "${@:" in body else max(needed | extra)), (recipe.name, command)
    assert known


def test_shown_extras_exist() -> None:
    shown = lines(r"pip install")
    assert len(shown) >= 4
    for _, line in shown:
        extras_exist(line)


@pytest.mark.parametrize(
    ("line", "small"),
    [
        ("python -m benchmarks.paper.own_tasks", "--draws 8 --iters 1 --work DIR/work"),
        ("python -m benchmarks.paper figure5", "--out DIR"),
    ],
)
def test_a_shown_benchmark_runs_at_a_small_size(
    line: str, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ("docs/results.md", line) in lines(r"python -m benchmarks\b")
    words = [*shlex.split(line)[2:], *small.split()]  # of an option given twice the last counts
    monkeypatch.setattr(import_module("benchmarks.paper.own_tasks"), "RESULTS", tmp_path)
    tasks = import_module("own_tasks").TASKS
    monkeypatch.setattr(import_module("own_tasks"), "TASKS", dict(list(tasks.items())[:1]))
    monkeypatch.setattr(sys, "argv", [word.replace("DIR", str(tmp_path)) for word in words])
    import_module("benchmarks.paper.__main__" if words[0] == "benchmarks.paper" else words[0]).main()
    (found,) = tmp_path.glob("*.json")
    assert json.loads(found.read_text("utf-8"))


@pytest.mark.parametrize(("file", "line"), lines(r"make [a-z]"))
def test_make_knows_what_a_shown_target_needs(file: str, line: str) -> None:
    done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_documents_show_programs() -> None:
    """The lines above are found at all."""
    assert len(lines(r"python -m benchmarks\b")) >= 60
    assert ("README.md", "make demo") in lines("make [a-z]")
    assert len(lines(r"recipes/\w+\.sh \w")) >= 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("python -m benchmarks.paper.heasd --data DIR", "no module benchmarks.paper.heasd"),
        ("python -m benchmarks.serve", "a package that is no command"),
        ("python -m benchmarks.paper tabel3 --data DIR", "no table or figure"),
        ("python -m benchmarks.provenance", "it is no command"),
        ("python -m benchmarks.results_page --out DIR", "takes no words"),
        ("python -m benchmarks.paper.heads --data DIR --no-such", "refuses"),
        ("python -m benchmarks.paper.heads --data DIR --iters many", "refuses"),
        ("python -m benchmarks.speed.cpu_settings kernel", "refuses"),
        ("python -m benchmarks.paper table3|figure3 --data DIR --point TOKENS", "refuses"),
        ("make tests", "no tests"),
        ("make kill M=50", "no M=50"),
        ("recipes/minni.sh A B C", "no recipes/minni.sh"),
        ("recipes/mini.sh CORPUS_DIR WORK_DIR", "takes 3 to 4 words"),
        ("recipes/mini.sh A B C 1 2", "takes 3 to 4 words"),
        ("recipes/backbone.sh trian WORK_DIR", "no command trian"),
        ("pip install '.[trains]'", "no extra trains"),
    ],
)
def test_a_wrong_line_is_found(line: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=said):  # noqa: PT012
        if line.startswith("python"):
            for words in variants(line):
                accepted(words, monkeypatch)
        else:
            check = {"make": target_exists, "pip": extras_exist}.get(line.split()[0], recipe_takes)
            check(line)
