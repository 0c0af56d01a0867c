"""Settings of multi-task pre-training and of tuning by gradient, validated once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mp2.errors import UsageError
from mp2.limits import MAX_SEED
from mp2.optimizers.config import Kind
from mp2.options import check, option
from mp2.runs.config import BbtConfig

_RATE: dict[str, Any] = {"at_least": 0, "below": 1, "expected": "0 <= rate < 1"}
_RATE_ABOVE_0: dict[str, Any] = {"above": 0, "below": 1, "expected": "0 < rate < 1"}
_POSITIVE: dict[str, Any] = {"above": 0, "expected": "a positive number"}
_INJECTIONS = ("prefix", "inline")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything needed to run a pre-training again; defaults are the paper's (section 4.2, appendix A.1)."""

    kind: Literal["deep", "shallow"] = option(
        "deep",
        "Prompts at every layer, or at the input only.",
        what="kind of prompts",
        choices=("deep", "shallow"),
    )
    injection: Literal["prefix", "inline"] | None = option(  # shallow is always inline
        None, "Of deep prompts.", choices=_INJECTIONS, default_text="prefix"
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
    steps: int = option(1_000_000, "Optimizer steps.", at_least=1)
    batch_size: int = option(32, "Examples a step, all of one task.", at_least=1)  # of all processes together
    router_lr: float | None = option(  # fast and slow learning (section 3.3)
        None, "Rate of the routers.", default_text="5e-4 deep, 1e-3 shallow", **_RATE
    )
    prompt_lr: float | None = option(
        None, "Rate of z, A, head.", default_text="1e-4 deep, 1e-3 shallow", **_RATE
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
        if self.kind == "shallow" and self.injection == "prefix":
            raise UsageError("injection is 'prefix', but shallow prompts are always inline: drop --injection")

    @property
    def n_inline(self) -> int:
        """Rows that the prompts take in the sequence itself."""
        return self.prompt_tokens if self.kind == "shallow" or self.injection == "inline" else 0

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates (router, prompts): the paper's unless given."""
        router, prompts = (5e-4, 1e-4) if self.kind == "deep" else (1e-3, 1e-3)
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


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Gradient tuning of one task; defaults are the paper's (appendix A.2)."""

    run: BbtConfig  # what black-box tuning has too: task, data, prompts, seed ...; its search is not used
    injection: Literal["prefix", "inline"] | None = option(
        None, "Of deep prompts.", choices=_INJECTIONS, default_text="the file's"
    )
    epochs: int = option(1000, "Both stages together.", at_least=2)
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
    temperature: float = 1.0  # of the relaxed Bernoulli routers, as in pre-training
    dev_every: int = 10  # epochs

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        check(self)
        if self.router_epochs is not None and self.router_epochs > self.epochs:
            raise UsageError(f"router_epochs is {self.router_epochs}, expected 0 to {self.epochs} (epochs)")
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

    def sha256(self) -> str:
        """Hash of all fields: two runs with the same hash, data and files give the same result."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def method(self, kind: Kind) -> str:
        """What the result calls this run: ``mp2-deep-gradient``, ``mp2-deep-gradient-router``, ..."""
        return f"mp2-{kind}-gradient" + ("-router" if self.run.router_only else "")


@dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """How a backbone is trained; the defaults are the command line's, and step 1 of recipes/mini.sh."""

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
