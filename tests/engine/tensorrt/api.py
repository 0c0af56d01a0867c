"""What mp2's source touches of TensorRT's Python API, read from the source; and the recorded signatures.

Every module of mp2 that touches TensorRT imports it under ``TYPE_CHECKING`` as ``trt`` and annotates the
objects it gets from it. From these annotations the class of every object is known, and with it the class of
every member that is read, called or set.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[3] / "mp2"
_MODULES = ("module", "self._module")  # how the source calls the imported library
_PYTHON_NAMES = {"nvonnxparser::IParserError": "ParserError"}  # where a docstring has the C++ name only


@dataclass(frozen=True)
class Use:
    """A member of a TensorRT class that the source touches, and how."""

    owner: str  # class, "" = the library itself
    member: str
    how: str  # read, set, call, override
    n_positional: int = 0
    keywords: tuple[str, ...] = ()
    declared: str = ""  # class that the source says the result has
    place: str = ""


def source_files() -> list[Path]:
    """Return the modules that touch TensorRT."""
    return [
        path for path in sorted(PACKAGE.rglob("*.py")) if "import tensorrt as trt" in path.read_text("utf-8")
    ]


def touched_uses() -> list[Use]:
    """Return every use in `source_files`."""
    return [use for path in source_files() for use in _Walk(path).uses]


def touched_members() -> dict[str, list[str]]:
    """Return class -> members, constructors as ``__init__``; a nested class by its dotted name."""
    found: dict[str, set[str]] = {}
    for use in touched_uses():
        if use.owner:
            found.setdefault(use.owner, set()).add(use.member)
        elif use.member[0].isupper():
            found.setdefault(use.member, set()).update({"__init__"} if use.how == "call" else ())
    return {name: sorted(members) for name, members in sorted(found.items())}


def unresolved(members: set[str]) -> list[str]:
    """Return places where a member named like one of ``members`` is touched on an object of unknown class."""
    return [place for path in source_files() for name, place in _Walk(path).unknown if name in members]


class _Walk:
    """One module: the uses that could be resolved, and every other attribute."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uses: list[Use] = []
        self.unknown: list[tuple[str, str]] = []
        tree = ast.parse(path.read_text("utf-8"))
        self._attributes = dict(self._annotated(tree, only_self=True))
        self._visit(tree, {})

    def _annotated(self, tree: ast.AST, *, only_self: bool) -> Iterator[tuple[str, str]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign):
                target, kind = ast.unparse(node.target), _trt_class(node.annotation)
                if kind and target.startswith("self.") == only_self:
                    yield target, kind

    def _visit(self, node: ast.AST, known: dict[str, str]) -> None:
        if isinstance(node, ast.FunctionDef):
            known = dict(known)
            for argument in (*node.args.args, *node.args.kwonlyargs):
                if argument.annotation is not None and (kind := _trt_class(argument.annotation)):
                    known[argument.arg] = kind
            known.update(self._annotated(node, only_self=False))
            for annotation in [a.annotation for a in node.args.args] + [node.returns]:
                if annotation is not None and (kind := _trt_class(annotation)):
                    self._add("", kind.split(".")[0], "read", node)
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if (name := ast.unparse(base)).startswith("module."):
                    for item in node.body:
                        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                            self._add(name[7:], item.name, "override", item, len(item.args.args))
        if isinstance(node, ast.AnnAssign):
            if (kind := _trt_class(node.annotation)) and isinstance(node.value, ast.Call):
                self._use(node.value.func, known, node.value, declared=kind)
                for child in (*node.value.args, *node.value.keywords):
                    self._visit(child, known)
                return
            self._visit_children(node, known, skip=node.annotation)
            return
        if isinstance(node, ast.Call):
            self._use(node.func, known, node)
            for child in (*node.args, *node.keywords):
                self._visit(child, known)
            return
        if isinstance(node, ast.Attribute):
            self._use(node, known, None)
            return
        skip = None
        if isinstance(node, ast.arg):
            skip = node.annotation
        self._visit_children(node, known, skip=skip)

    def _visit_children(self, node: ast.AST, known: dict[str, str], skip: ast.AST | None = None) -> None:
        for child in ast.iter_child_nodes(node):
            if child is not skip and not (isinstance(node, ast.FunctionDef) and child is node.returns):
                self._visit(child, known)

    def _use(self, node: ast.expr, known: dict[str, str], call: ast.Call | None, declared: str = "") -> None:
        if not isinstance(node, ast.Attribute):
            self._visit(node, known)
            return
        owner = self._class_of(node.value, known)
        if owner is None:
            self.unknown.append((node.attr, f"{self.path.name}:{node.lineno} {ast.unparse(node)}"))
            self._visit(node.value, known)
            return
        how = "call" if call else "set" if isinstance(node.ctx, ast.Store) else "read"
        if isinstance(node.value, ast.Attribute) and owner:
            self._visit(node.value, known)
        positional = len(call.args) if call else 0
        keywords = tuple(k.arg or "**" for k in call.keywords) if call else ()
        self._add(owner, node.attr, how, node, positional, keywords, declared)

    def _class_of(self, node: ast.expr, known: dict[str, str]) -> str | None:
        """Return the class of an expression, "" for the library, None if it has nothing to do with it."""
        text = ast.unparse(node)
        if text in _MODULES:
            return ""
        if text in known:
            return known[text]
        if text in self._attributes:
            return self._attributes[text]
        if isinstance(node, ast.Attribute):
            owner = self._class_of(node.value, known)
            if owner is not None and node.attr[0].isupper():
                return f"{owner}.{node.attr}" if owner else node.attr
        return None

    def _add(
        self,
        owner: str,
        member: str,
        how: str,
        node: ast.AST,
        n_positional: int = 0,
        keywords: tuple[str, ...] = (),
        declared: str = "",
    ) -> None:
        place = f"{self.path.name}:{getattr(node, 'lineno', 0)}"
        self.uses.append(Use(owner, member, how, n_positional, keywords, declared, place))


def _trt_class(annotation: ast.expr) -> str | None:
    """Return ``X`` for the annotations ``trt.X`` and ``trt.X | None``."""
    match = re.fullmatch(r"trt\.([\w.]+)( \| None)?", ast.unparse(annotation))
    return match[1] if match else None


# -- recorded signatures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """A signature as the bindings' docstring gives it."""

    signature: inspect.Signature
    returns: str

    def accepts(self, n_positional: int, keywords: tuple[str, ...]) -> bool:
        """Tell whether a call with so many positional arguments and these keywords fits (self apart)."""
        try:
            self.signature.bind(*[None] * n_positional, **dict.fromkeys(keywords))
        except TypeError:
            return False
        return True


def parse_signature(text: str) -> Recorded:
    """Return ``name(self: X, a: int, b: str = 'c') -> Y`` as a signature without ``self``."""
    match = re.fullmatch(r"\w*\((.*)\) -> (.*)", text)
    if match is None:
        raise ValueError(f"no signature: {text!r}")
    parameters = []
    for part in _split(match[1]):
        name = part.split(":")[0].split("=")[0].strip()
        if name in ("self", "arg0"):
            continue
        default = (
            None if "=" in re.sub(r"<[^>]*>", "", part.replace("= <", "=<")) else inspect.Parameter.empty
        )
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    returns = match[2].strip()
    return Recorded(inspect.Signature(parameters), _PYTHON_NAMES.get(returns, returns))


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for k, character in enumerate(text):
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append(text[start:k])
            start = k + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


def fault(use: Use, classes: dict[str, dict[str, object] | None]) -> str | None:
    """Return what is wrong with ``use`` in recorded ``classes``, None if nothing is."""
    owner, member = (use.owner, use.member) if use.owner else (use.member, "__init__")
    recorded = classes.get(owner)
    if recorded is None:
        return f"{use.place}: there is no class {owner}"
    if not use.owner and use.how == "read":
        return None
    entry = recorded["touched"].get(member)  # type: ignore[attr-defined]
    if entry is None:
        return f"{use.place}: {owner} has no member '{member}'"
    if use.how == "set":
        return None if entry.get("set") else f"{use.place}: {owner}.{member} cannot be set"
    if use.how == "read":
        return f"{use.place}: {owner}.{member} must be called" if entry["kind"] == "method" else None
    if entry["kind"] != "method":
        return f"{use.place}: {owner}.{member} is no method"
    n_positional = use.n_positional
    explicit_self = use.how == "override" or (member == "__init__" and use.owner != "")
    if explicit_self:  # class.method(self, ...)
        n_positional -= 1
    fits = [s for s in map(parse_signature, entry["signatures"]) if s.accepts(n_positional, use.keywords)]
    if not fits:
        given = f"{use.n_positional} {use.keywords}"
        return f"{use.place}: {owner}.{member} takes {entry['signatures']}, not {given}"
    if use.declared and member != "__init__" and all(s.returns != use.declared for s in fits):
        return f"{use.place}: {owner}.{member} returns {[s.returns for s in fits]}, not {use.declared}"
    return None
