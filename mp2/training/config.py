"""Settings of a multi-task pre-training run, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mp2.errors import UsageError
from mp2.limits import check_seed


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything needed to run a pre-training again; defaults are the paper's (section 4.2, appendix A.1)."""

    kind: Literal["deep", "shallow"] = "deep"
    injection: Literal["prefix", "inline"] | None = None  # None: deep by prefix; shallow is always inline
    router_inference: Literal["hard", "soft"] = "hard"  # w > 0 (paper), or sigmoid(w) (authors' code)
    router_normalisation: Literal["count", "sum"] = "count"  # divided by K (eq. 1), or by the weights' sum
    n_modules: int = 8
    prompt_tokens: int = 50
    intrinsic_dim: int = 300
    steps: int = 1_000_000
    batch_size: int = 32  # of all processes together
    router_lr: float | None = None  # None: 5e-4 deep, 1e-3 shallow
    prompt_lr: float | None = None  # None: 1e-4 deep, 1e-3 shallow (fast and slow learning)
    backbone_lr: float = 0.0  # 0: frozen
    schedule: Literal["constant", "linear"] = "constant"
    warmup_steps: int = 0
    temperature: float = 1.0
    temperature_end: float | None = None  # None: not annealed, as in the paper
    max_tokens: int = 512
    rotated: bool = False  # also every classification task with the next option as its answer (ours)
    shuffle_options: bool = False  # options of a training example in an order of its own (ours)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    dev_limit: int = 300
    eval_every: int = 0  # 0: dev scores before and after only
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in (
            "n_modules",
            "prompt_tokens",
            "intrinsic_dim",
            "steps",
            "batch_size",
            "max_tokens",
            "dev_limit",
        ):
            if getattr(self, name) < 1:
                shown = "modules" if name == "n_modules" else name
                raise UsageError(f"{shown} is {getattr(self, name)}, expected at least 1")
        for name in ("temperature", "temperature_end"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value}, expected a positive number")
        for name, known in (
            ("kind", ("deep", "shallow")),
            ("injection", ("prefix", "inline", None)),
            ("router_inference", ("hard", "soft")),
            ("router_normalisation", ("count", "sum")),
            ("schedule", ("constant", "linear")),
            ("precision", ("fp32", "bf16")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name} is '{getattr(self, name)}', expected {' or '.join(filter(None, known))}"
                )
        if self.kind == "shallow" and self.injection == "prefix":
            raise UsageError("injection is 'prefix', but shallow prompts are always inline: drop --injection")
        for name in ("router_lr", "prompt_lr", "backbone_lr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{name} is {value}, expected 0 <= rate < 1")
        check_seed(self.seed)
        for name in ("warmup_steps", "eval_every", "checkpoint_minutes"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 or more")

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
