"""Settings of multi-task pre-training and of tuning by gradient, validated once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mp2.errors import UsageError
from mp2.injection import INJECTIONS
from mp2.limits import MAX_SEED
from mp2.optimizers.config import Kind
from mp2.options import check, option
from mp2.runs.config import BbtConfig

_RATE: dict[str, Any] = {"at_least": 0, "below": 1, "expected": "0 <= rate < 1"}
_RATE_ABOVE_0: dict[str, Any] = {"above": 0, "below": 1, "expected": "0 < rate < 1"}
_POSITIVE: dict[str, Any] = {"above": 0, "expected": "a positive number"}
_INJECTIONS = ("prefix", "inline", "added")


def check_injection(kind: str, injection: str | None) -> None:
    """Raise ``UsageError`` for an injection that prompts of this kind cannot have."""
    if injection not in (None, *INJECTIONS[kind]):
        raise UsageError(
            f"injection is '{injection}', expected {' or '.join(INJECTIONS[kind])} for {kind} prompts: "
            "give one of these, or drop --injection"
        )


PRETRAIN_METHODS = ("mp2", "spot", "ppt", "head")
PRETRAIN_STEPS = {
    "mp2": 1_000_000,
    "spot": 650_000,
    "ppt": 400_000,
    "head": 650_000,
}  # appendix A.1; head: ours
_SINGLE_RATES = {"spot": 3e-3, "ppt": 3e-2, "head": 1e-3}  # appendix A.1; head: ours
# what the single prompts of spot and ppt, and a head alone, have in place of a router and modules
_SINGLE: dict[str, Any] = {
    "kind": "shallow",
    "n_modules": 1,
    "intrinsic_dim": 1,
    "router_inference": "soft",
    "router_normalisation": "sum",
}
_NOT_OF_SINGLE = (*_SINGLE, "router_lr", "temperature", "temperature_end", "backbone_lr", "rotated")
_NOT_OF = {  # settings that a method does not read
    "mp2": (),
    "spot": _NOT_OF_SINGLE,
    "ppt": (*_NOT_OF_SINGLE, "shuffle_options"),
    "head": (*_NOT_OF_SINGLE, "prompt_tokens", "injection"),
}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything needed to run a pre-training again; defaults are the paper's (section 4.2, appendix A.1)."""

    method: Literal["mp2", "spot", "ppt", "head"] = option(
        "mp2",
        "mp2; spot or ppt: one soft prompt, on tasks or on --corpus; head: a span head alone.",
        choices=PRETRAIN_METHODS,
    )
    kind: Literal["deep", "shallow"] = option(
        "deep",
        "Prompts at every layer, or at the input only.",
        what="kind of prompts",
        choices=("deep", "shallow"),
    )
    injection: Literal["prefix", "inline", "added"] | None = option(
        None,
        "Deep: prefix or inline; shallow: inline, or added (after the embedding LayerNorm).",
        choices=_INJECTIONS,
        default_text="prefix deep, inline shallow",
    )
    router_inference: Literal["hard", "soft"] = option(  # w > 0 (paper), or sigmoid(w) (authors' code)
        "hard", "hard (w > 0), or soft.", choices=("hard", "soft")
    )
    router_normalisation: Literal["count", "sum"] = option(  # eq. 1, or the weights' sum (authors' code)
        "count", "Divide by count (K), or sum.", choices=("count", "sum")
    )
    n_modules: int = option(8, "Modules K.", flag="modules", at_least=1)
    prompt_tokens: int = option(50, "Prompt tokens m.", at_least=1)
    intrinsic_dim: int = option(300, "Intrinsic dimensions d.", at_least=1)
    steps: int = option(1_000_000, "Optimizer steps; spot 650,000, ppt 400,000.", at_least=1)
    batch_size: int = option(32, "Examples a step, all of one task.", at_least=1)  # of all processes together
    router_lr: float | None = option(  # fast and slow learning (section 3.3)
        None, "Rate of the routers.", default_text="5e-4 deep, 1e-3 shallow", **_RATE
    )
    prompt_lr: float | None = option(
        None,
        "Rate of z, A, head.",
        default_text="1e-4 deep, 1e-3 shallow; spot 3e-3, ppt 3e-2",
        **_RATE,
    )
    backbone_lr: float = option(0.0, "Above 0: train the backbone too.", **_RATE)
    schedule: Literal["constant", "linear"] = option(
        "constant", "Of the rates.", choices=("constant", "linear")
    )
    warmup_steps: int = option(0, "Linear warm-up.", at_least=0)
    temperature: float = option(1.0, "Of the relaxed Bernoulli routers.", **_POSITIVE)
    temperature_end: float | None = option(  # not annealed in the paper
        None, "Anneal to this, geometrically.", default_text="constant", **_POSITIVE
    )
    max_tokens: int = option(512, "Longest sequence.", at_least=1)
    rotated: bool = option(False, "Also train twins: the next option is right.")  # ours
    shuffle_options: bool = option(False, "Options of a training example in an order of its own.")  # ours
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32 or bf16 (autocast).", choices=("fp32", "bf16"))
    seed: int = option(0, "Draws everything.", at_least=0, at_most=MAX_SEED, expected=f"0 to {MAX_SEED}")
    dev_limit: int = option(300, "Dev examples scored a task.", at_least=1)
    eval_every: int = option(0, "Steps between dev scores; 0: before and after only.", at_least=0)
    checkpoint_minutes: float = option(
        5.0, "Minutes between checkpoints.", at_least=0, expected="0 or more minutes"
    )

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        check(self)
        if self.method != "mp2":
            self._become_single()
        check_injection(self.kind, self.injection)

    def _become_single(self) -> None:
        """Take the shape of one soft prompt, or of none; refuse what it does not have."""
        defaults = {item.name: item.default for item in fields(self)}
        taken = _SINGLE | ({"prompt_tokens": 0} if self.method == "head" else {})
        for name in _NOT_OF[self.method]:
            if (got := getattr(self, name)) not in (defaults[name], taken.get(name, defaults[name])):
                raise UsageError(f"{name} is {got}, and method {self.method} has none: drop it")
        for name, value in taken.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def not_of(method: str, given: Collection[str]) -> str | None:
        """The first of the ``given`` settings or flags that ``method`` does not read; None: it reads all."""
        names = {"modules": "n_modules", "deep": "kind", "shallow": "kind"}
        return next((name for name in sorted(given) if names.get(name, name) in _NOT_OF[method]), None)

    @property
    def n_inline(self) -> int:
        """Rows that the prompts take in the sequence itself."""
        return self.prompt_tokens if self.kind == "shallow" or self.injection == "inline" else 0

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates (router, prompts): the paper's unless given."""
        router, prompts = (5e-4, 1e-4) if self.kind == "deep" else (1e-3, 1e-3)
        prompts = _SINGLE_RATES.get(self.method, prompts)
        return (
            router if self.router_lr is None else self.router_lr,
            prompts if self.prompt_lr is None else self.prompt_lr,
        )

    def rate_share(self, step: int) -> float:
        """Share of the learning rates that step ``step`` (from 0) uses: linear warm-up, then the schedule."""
        ramp = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "linear":
            ramp = min(ramp, (self.steps - step) / max(1, self.steps - self.warmup_steps))
        return ramp

    def temperature_at(self, step: int) -> float:
        """Temperature of the relaxed routers at step ``step`` (from 0).

        Geometric from ``temperature`` at the first step to ``temperature_end`` at the last:
        tau_s = tau_0 (tau_1 / tau_0)^(s / (S - 1)). Routers are trained soft (eq. 4) but used hard (w > 0):
        the lower the temperature, the nearer the samples are to 0 and 1 and the smaller that gap, at the
        price of gradients of more variance (Maddison et al., 2017): hence warm first and cool at the end.
        """
        if self.temperature_end is None or self.steps == 1:
            return self.temperature
        done = step / (self.steps - 1)
        return float(self.temperature * (self.temperature_end / self.temperature) ** done)


TUNE_METHODS = ("mp2", "model-tuning", "prompt-tuning", "p-tuning-v2", "head-tuning")
_ONLY_MP2 = ("injection", "router_epochs", "router_lr", "prompt_lr")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Gradient tuning of one task; defaults are the paper's (appendix A.2)."""

    run: BbtConfig  # what black-box tuning has too: task, data, prompts, seed ...; its search is not used
    method: str = option(  # those beside mp2: mp2.training.methods
        "mp2",
        "mp2, model-tuning, prompt-tuning (SPoT's and PPT's too, with --prompts), p-tuning-v2, head-tuning.",
        choices=TUNE_METHODS,
    )
    lr: tuple[float, ...] = ()  # rates that are tried, and dev chooses; empty: the method's. Not of mp2
    prompt_tokens: int | None = option(
        None, "Prompt tokens m of a prompt that begins here.", default_text="50", at_least=1
    )
    injection: Literal["prefix", "inline", "added"] | None = option(
        None, "Of the prompts, see mp2 pretrain.", choices=_INJECTIONS, default_text="the file's"
    )
    epochs: int | None = option(None, "Epochs (a rate).", default_text="1000, model-tuning 200", at_least=2)
    router_epochs: int | None = option(
        None, "Of stage I; 0: every module on.", default_text="half of --epochs", at_least=0
    )
    router_lr: float | None = option(
        None, "Rate of stage I.", default_text="3e-3 deep, 1e-2 shallow", **_RATE_ABOVE_0
    )
    prompt_lr: float | None = option(
        None, "Rate of stage II.", default_text="2e-5 deep, 3e-4 shallow", **_RATE_ABOVE_0
    )
    batch_size: int = option(32, "Examples a step.", at_least=1)
    training_precision: Literal["fp32", "bf16"] = option(
        "fp32", "Of training: fp32 or bf16 (autocast); scores are fp32.", choices=("fp32", "bf16")
    )
    temperature: float = 1.0  # of the relaxed Bernoulli routers, as in pre-training
    dev_every: int = 10  # epochs

    def __post_init__(self) -> None:
        """Refuse values that no run can have, and settings that the method does not have."""
        check(self)
        object.__setattr__(self, "lr", tuple(self.lr))
        wrong = [x for x in self.lr if not 0 < x < 1]
        if wrong:
            raise UsageError(f"lr is {wrong[0]}, expected 0 < rate < 1")
        for name, applies in self._applies().items():
            if not applies:
                raise UsageError(
                    f"{name} was given, and method {self.method} has none: drop --{name.replace('_', '-')}"
                )
        if self.router_epochs is not None and self.router_epochs > self.n_epochs:
            raise UsageError(f"router_epochs is {self.router_epochs}, expected 0 to {self.n_epochs} (epochs)")
        if self.router_epochs == 0 and self.run.router_only:
            raise UsageError("router_epochs is 0, expected at least 1 with --router-only")
        for rate, stage, absent in (
            ("router_lr", "stage I (router_epochs is 0)", self.router_epochs == 0),
            ("prompt_lr", "stage II (--router-only)", self.run.router_only),
        ):
            if absent and getattr(self, rate) is not None:
                raise UsageError(f"{rate} was given, and there is no {stage}")
        if self.dev_every < 1:
            raise UsageError(f"dev_every is {self.dev_every}, expected at least 1")
        if not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature}, expected a positive number")

    def rates(self, kind: Kind) -> tuple[float, float]:
        """Learning rates (router, prompts): the paper's unless given."""
        router, prompts = (3e-3, 2e-5) if kind == "deep" else (1e-2, 3e-4)
        return self.router_lr or router, self.prompt_lr or prompts

    def _applies(self) -> dict[str, bool]:
        """Of every setting that was given, whether the method reads it."""
        mp2 = self.method == "mp2"
        begins = self.method in ("prompt-tuning", "p-tuning-v2") and self.run.prompts is None
        of_method = {
            **dict.fromkeys(_ONLY_MP2, mp2),
            "lr": not mp2,
            "prompt_tokens": begins,
        }
        given = {name: ok for name, ok in of_method.items() if getattr(self, name) not in (None, ())}
        if self.run.kind != "auto":
            given[self.run.kind] = mp2
        if self.run.router_only:
            given["router_only"] = mp2
        if self.run.prompts is not None:
            given["prompts"] = self.method in ("mp2", "prompt-tuning")
        return given

    @property
    def n_epochs(self) -> int:
        """Epochs of a run, of each rate where several are tried."""
        return self.epochs or (200 if self.method == "model-tuning" else 1000)

    def sha256(self) -> str:
        """Hash of all fields: two runs with the same hash, data and files give the same result."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def label(self, kind: Kind, started_by: str | None = None) -> str:
        """What the result calls this run: ``mp2-deep-gradient``, ``prompt-tuning``, ``spot`` ...

        ``started_by`` is the method of ``mp2 pretrain`` that made the prompts.
        """
        if self.method != "mp2":
            return started_by or self.method
        return f"mp2-{kind}-gradient" + ("-router" if self.run.router_only else "")


@dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """How a backbone is trained; the defaults are the command line's."""

    n_layers: int = option(4, "Layers L.", flag="layers", at_least=1)
    hidden: int = option(128, "Hidden size H.", at_least=1)
    n_heads: int = option(4, "Attention heads h.", flag="heads", at_least=1)
    ffn: int = 512  # the command's is four times the hidden size
    vocab_size: int = option(5300, "Tokens of the character vocabulary.")
    max_positions: int = option(256, "Longest sequence of the backbone.", at_least=1)
    length: int = option(128, "Tokens a training sequence.", at_least=3, why=": [CLS], a character, [SEP]")
    batch_size: int = option(32, "Sequences a step.", at_least=1)
    steps: int = option(3600, "Optimizer steps.", at_least=1)
    learning_rate: float = option(1e-3, "Peak learning rate.", flag="lr", **_RATE_ABOVE_0)
    warmup_steps: int | None = option(
        None, "Steps in which the rate rises to it.", default_text="5 %", at_least=0
    )
    decay_steps: int | None = option(
        None, "Last steps in which it falls to 0.", default_text="all the rest", at_least=0
    )
    weight_decay: float = 0.01
    masking: Literal["char", "span", "mixed"] = option(
        "char", "Characters, runs of characters (span), or mixed.", choices=("char", "span", "mixed")
    )
    mask_rate: float = option(
        0.15,
        "Share of the tokens that are predicted.",
        above=0,
        below=1,
        expected="a share between 0 and 1",
    )
    contrastive: float = option(  # weight of mp2.training.contrastive
        0.0, "Weight of pulling neighbouring passages together.", at_least=0, expected="a weight of 0 or more"
    )
    ppmi_init: bool = True
    precision: Literal["fp32", "bf16"] = option("bf16", "fp32 or bf16 (autocast).", choices=("fp32", "bf16"))
    seed: int = option(0, "Draws everything.", at_least=0, at_most=MAX_SEED, expected=f"0 to {MAX_SEED}")
    checkpoint_minutes: float = option(
        5.0, "Minutes between checkpoints.", at_least=0, expected="0 or more minutes"
    )

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        check(self)
        if self.ffn < 1:
            raise UsageError(f"ffn is {self.ffn}, expected at least 1")
        if self.hidden % self.n_heads:
            raise UsageError(f"hidden is {self.hidden}, expected a multiple of the {self.n_heads} heads")
        if self.length > self.max_positions:
            raise UsageError(
                f"length is {self.length}, expected at most {self.max_positions} (max_positions)"
            )
        if self.contrastive and self.batch_size % 2:
            raise UsageError(
                f"batch_size is {self.batch_size}, expected an even one with contrastive: rows come in pairs"
            )
