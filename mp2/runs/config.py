"""What a black-box tuning run is: one frozen dataclass a stage, written as ``config.json`` and read back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mp2.errors import UsageError
from mp2.json_files import build
from mp2.limits import MAX_THREADS
from mp2.optimizers.config import Kind, LayerConfig, RouterConfig, SearchConfig
from mp2.options import option

__all__ = ["BbtConfig", "LayerConfig", "RouterConfig"]
SCHEMA_VERSION = 1
KINDS = ("auto", "deep", "shallow")
METHODS = ("mp2", "bbt", "bbtv2")
HEADS = ("auto", "span", "mlm", "ridge")
RIDGE_FEATURES = ("states+ngrams", "states")
RUNTIMES = (
    "auto",
    "torch",
    "onnxruntime",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    "onnxruntime-openvino",
    "endpoint",
)  # those of mp2.engine
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp8", "int8")  # of any device

PUBLISHED = {"bbt": "published-bbt", "bbtv2": "published-bbtv2"}
"""What the prompts of a method without pre-trained ones are called; `mp2.runs.scratch` makes them."""


@dataclass(frozen=True, kw_only=True)
class BbtConfig(SearchConfig):
    """Everything that `mp2 bbt` needs to run, and to run again: the search, and what it searches."""

    method: Literal["mp2", "bbt", "bbtv2"] = option(
        "mp2", "mp2; or BBT, BBTv2 as published: random projections, label words.", choices=METHODS
    )
    task: str = option(help="A name of 'mp2 tasks', or your own card (a TOML file).", kind="task")
    data: str | None = option(
        None, "Folder with TASK/train.*, a training file, or hub:NAME; or MP2_DATA.", kind="path"
    )
    backbone: str = option("mini", "mini, cpt-large, a folder, or a hub id.", kind="backbone")
    revision: str | None = option(
        None, "Of a hub backbone: a branch, tag or commit.", default_text="the hub's newest"
    )
    prompts: str | None = option(
        None,
        "Modular prompts: a file, mini-deep or mini-shallow.",
        kind="prompts",
        default_text="the backbone's",
    )
    kind: Literal["auto", "deep", "shallow"] = option(  # auto: what the prompt file holds; without one, deep
        "auto", "Prompts at every layer, or at the input only.", what="kind of prompts", choices=KINDS
    )
    shots: int | None = option(  # None: the card's
        None, "Examples a label (in all, if the task has no labels).", at_least=1
    )
    dev: Literal["auto", "none"] = option(
        "auto",
        "The dev set: the data's own, else what train leaves; none: the training loss selects.",
        what="dev set",
        choices=("auto", "none"),
    )
    field: tuple[str, ...] = option((), kind="field")  # KEY=NAME: the data's names for the card's keys
    baselines: bool = option(True, "No baselines beside the result.", flag="no-baselines")
    max_tokens: int | None = option(
        None, "Longest sequence.", default_text="what the backbone allows", at_least=1
    )
    head: Literal["auto", "span", "mlm", "ridge"] = option(
        "auto",
        "What reads the answers: span (pre-trained prompts'), mlm (the checkpoint's), ridge (closed form).",
        choices=HEADS,
    )
    ridge_features: Literal["states+ngrams", "states"] = option(
        "states+ngrams", "What the ridge head looks at.", choices=RIDGE_FEATURES
    )
    engine: str | None = option(None, "Engine folder of 'mp2 export'.", kind="path")
    runtime: str = option("auto", "What computes.", choices=RUNTIMES)
    precision: str = option(  # auto: fp32 on a CPU, fp16 on a GPU or what fits; config.json has the one taken
        "auto",
        "On a CPU fp32, and bf16 or int8 differences from the mean; on a GPU fp32, fp16, bf16, fp8.",
        choices=PRECISIONS,
    )
    device: str = option("auto", "cpu, cuda, cuda:1 ...", kind="device")  # auto: the GPU if there is one
    threads: int | None = option(
        None,
        "Threads of the runtime.",
        default_text="its own choice",
        at_least=1,
        at_most=MAX_THREADS,
        expected=f"1 to {MAX_THREADS}",
    )
    endpoint: str | None = option(
        None, "Servers of 'mp2 serve' that compute, with commas if several.", metavar="URL,..."
    )
    endpoint_patience_s: float = option(
        60.0,
        "How long a server may be silent before the run stops, its journal whole.",
        above=0,
        at_most=86_400,
    )
    test: bool = option(True, "Do not score the test set.", flag="no-test")
    test_limit: int | None = option(None, "Score the first N test examples only.", metavar="N", at_least=1)

    def __post_init__(self) -> None:
        """Refuse values that no run can have; open sets of names are checked where they are looked up."""
        super().__post_init__()
        object.__setattr__(self, "field", tuple(self.field))  # a list, where it was read back from JSON
        if self.method != "mp2":
            self._check_published()
        if self.ridge_features != "states+ngrams" and self.head not in ("auto", "ridge"):
            raise UsageError(
                f"ridge_features is {self.ridge_features}, and head {self.head} has none: drop one of them"
            )
        if self.test_limit is not None and not self.test:
            raise UsageError(
                f"test_limit is {self.test_limit}, and no test set is scored: drop --test-limit or --no-test"
            )

    def label(self, kind: Kind) -> str:
        """What the result calls this run: ``mp2-deep``, ``mp2-shallow-router``, ``bbtv2`` ..."""
        if self.method != "mp2":
            return self.method
        return f"mp2-{kind}" + ("-router" if self.router_only else "")

    def _check_published(self) -> None:
        """Refuse what BBT and BBTv2 as published do not have, and take what they do."""
        made = PUBLISHED[self.method]
        kind: Kind = "shallow" if self.method == "bbt" else "deep"
        allowed = {
            "prompts": (None, made),
            "kind": ("auto", kind),
            "head": ("auto", "mlm"),
            "router_only": (False,),
        }
        for name, values in allowed.items():
            if (got := getattr(self, name)) not in values:
                flag = f"--{got}" if name == "kind" else f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{name} is {got}, and method {self.method} has random projections, no router and the "
                    f"head of label words: drop {flag}"
                )
        if self.router.method not in (RouterConfig().method, "none") or self.router.iterations is not None:
            raise UsageError(f"method {self.method} has no router to search: drop --router-search/-iters")
        taken = {
            "prompts": made,
            "kind": kind,
            "head": "mlm",
            "router": RouterConfig(method="none"),
            "layers": replace(self.layers, keep="ever"),
        }
        for name, value in taken.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self) | {"field": list(self.field)}

    @classmethod
    def from_json(cls, values: Any, path: Path | None = None) -> BbtConfig:
        """Read back what :meth:`to_json` wrote; raises ``FormatError`` for another type."""
        config = build(cls, values, path or "config")
        assert isinstance(config, BbtConfig)
        return config

    def sha256(self) -> str:
        """Hash of all fields: two runs with the same hash, data and files give the same result.

        Fields that came later count only where they are not at their defaults: older runs can be resumed.
        """
        values = self.to_json()
        for name, default in _LATER.items():
            if values[name] == default:
                del values[name]
        if values["layers"]["keep"] == LayerConfig.keep:
            del values["layers"]["keep"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_LATER: dict[str, Any] = {
    "method": "mp2",
    "revision": None,
    "endpoint": None,
    "endpoint_patience_s": 60.0,
    "dev": "auto",
    "field": [],
    "baselines": True,
    "head": "auto",
    "ridge_features": "states+ngrams",
}
