"""Trained modular prompts with their routers and span head, and the file they live in.

Shapes: L' layers with prompts (L if deep, 1 if shallow), K modules, m prompt tokens, d intrinsic dimensions,
H hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mp2.backbone.load import Backbone
from mp2.errors import FormatError, MismatchError, UnknownNameError, UsageError, shown
from mp2.files import json_bytes, write_tensors
from mp2.injection import INJECTIONS, Injection
from mp2.json_files import Fields, build, check, one_line, parse_object
from mp2.prompts.bernoulli import inference_weights
from mp2.tensor_files import float_tensor, open_safetensors

SCHEMA_VERSION = 1
EMBEDDED = {
    "mini-deep": Path(__file__).parent / "mini" / "deep.safetensors",
    "mini-shallow": Path(__file__).parent / "mini" / "shallow.safetensors",
}
"""Prompts whose weights ship with the package."""


@dataclass(frozen=True, kw_only=True)
class PromptMeta:
    """What a prompt file says about itself."""

    kind: Literal["deep", "shallow"]
    backbone: str
    backbone_sha256: str
    n_layers: int
    hidden: int
    n_heads: int
    n_modules: int = 8  # K, paper section 4.2
    prompt_tokens: int = 50  # m, paper section 4.2
    intrinsic_dim: int = 300  # d, paper Table 3 (BBT: 300 tunable parameters)
    router_inference: Literal["hard", "soft"] = "hard"
    router_normalisation: Literal["count", "sum"] = "count"
    injection: Injection | None = None  # None: prefix if deep, inline if shallow
    tasks: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.injection is None:
            object.__setattr__(self, "injection", INJECTIONS.get(self.kind, ("inline",))[0])
        choices = {
            "kind": ("deep", "shallow"),
            "router_inference": ("hard", "soft"),
            "router_normalisation": ("count", "sum"),
            "injection": INJECTIONS.get(self.kind, ()),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise FormatError(
                    f"is {shown(getattr(self, name))}, expected one of {', '.join(known)}", field=name
                )
        for name in ("n_layers", "hidden", "n_heads", "n_modules", "prompt_tokens", "intrinsic_dim"):
            value = getattr(self, name)
            least = 0 if name == "prompt_tokens" and self.injection == "inline" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise FormatError(f"is {shown(value)}, expected a positive integer", field=name)

    @property
    def prompt_layers(self) -> int:
        """L': number of layers that carry prompts."""
        return self.n_layers if self.kind == "deep" else 1

    @property
    def n_inline(self) -> int:
        """Rows that the prompts take in the sequence itself: m, or none where they enter as prefixes."""
        return 0 if self.injection == "prefix" else self.prompt_tokens

    @property
    def on_placeholders(self) -> bool:
        """Whether the prompts are added to the hidden states of placeholder rows, before L' layers."""
        return self.injection == "added" or (self.kind == "deep" and self.injection == "inline")

    @property
    def is_single(self) -> bool:
        """Whether this is one soft prompt p = A that no router scales: K = d = 1, divided by its own weight.

        Without rows (m = 0, shallow) it is a span head alone.
        """
        shape = (self.n_modules, self.intrinsic_dim)
        return shape == (1, 1) and self.router_normalisation == "sum"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the file."""
        layers, h = self.prompt_layers, self.hidden
        return {
            "z": (layers, self.n_modules, self.intrinsic_dim),
            "projection": (layers, self.intrinsic_dim, self.prompt_tokens * h),
            "routers": (len(self.tasks), layers, self.n_modules),
            "span_weight": (2, h),
            "span_bias": (2,),
        }


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Modular prompts: z [L', K, d], projection A [L', d, m*H], routers (logits) [n_tasks, L', K], span head.

    The span head scores every token as start (row 0) and end (row 1) of the answer: ``span_weight`` [2, H],
    ``span_bias`` [2].
    """

    meta: PromptMeta
    z: Tensor
    projection: Tensor
    routers: Tensor
    span_weight: Tensor
    span_bias: Tensor

    def __post_init__(self) -> None:
        for name, shape in self.meta.shapes().items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise FormatError(f"has shape {got}, expected {shape}", field=name)

    @property
    def kind(self) -> str:
        """``deep`` or ``shallow``."""
        return self.meta.kind

    @property
    def has_span_head(self) -> bool:
        """Whether a span head came with the prompts; those from scratch have none (all zero)."""
        return bool(self.span_weight.any())

    @property
    def sha256(self) -> str:
        """Hash of all tensors (float32 bytes), the router convention, an injection at placeholders."""
        how = f"{self.meta.router_inference}/{self.meta.router_normalisation}"
        if self.meta.on_placeholders:
            how += f"/{self.meta.injection}"
        digest = hashlib.sha256(how.encode())
        for name, shape in self.meta.shapes().items():
            digest.update(f"{name}{shape}".encode())
            digest.update(getattr(self, name).contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def fuse(self, router: Tensor) -> Tensor:
        """Fused intrinsic prompts [..., L', d] under router weights [..., L', K] (eq. 1 applied to z).

        Raises:
            UsageError: weights of another shape.
        """
        n_layers, n_modules = self.z.shape[:2]
        if tuple(router.shape[-2:]) != (n_layers, n_modules):
            raise UsageError(
                f"router has shape {tuple(router.shape)}, expected (..., {n_layers}, {n_modules}): "
                f"these are {self.kind} prompts of '{self.meta.backbone}'"
            )
        return fuse(self.z, router, self.meta.router_normalisation)

    def router(self, task: str) -> Tensor:
        """The pre-trained router of an upstream task as it is used at inference: weights [L', K]."""
        if task not in self.meta.tasks:
            raise UnknownNameError("pre-trained router", task, self.meta.tasks)
        return inference_weights(self.routers[self.meta.tasks.index(task)], self.meta.router_inference)

    def check_fits(self, backbone: Backbone) -> None:
        """Raise ``MismatchError`` unless these prompts were made for exactly this backbone."""
        meta, config = self.meta, backbone.config
        shape = (meta.n_layers, meta.hidden, meta.n_heads)
        if shape != (config.n_layers, config.hidden, config.n_heads):
            raise MismatchError(
                f"these prompts are for a {meta.n_layers}-layer backbone of hidden size {meta.hidden} with "
                f"{meta.n_heads} heads ('{meta.backbone}'), but '{config.name}' has "
                f"{config.n_layers} layers, hidden size {config.hidden}, {config.n_heads} heads; "
                f"pass --backbone {meta.backbone}"
            )
        if meta.backbone_sha256 != backbone.sha256:
            raise MismatchError(
                f"these prompts are for '{meta.backbone}' with weights {meta.backbone_sha256[:12]}, but "
                f"'{config.name}' has weights {backbone.sha256[:12]}: same shape, another training; "
                f"pass the backbone the prompts were trained on (--backbone {meta.backbone})"
            )


def fuse(z: Tensor, router: Tensor, normalisation: str) -> Tensor:
    """Weighted mean of intrinsic prompts (eq. 1): z [L', K, d], router [..., L', K] -> [..., L', d].

    ``count`` divides by K as the paper does, ``sum`` by the sum of the weights as the authors' code does.
    """
    weights = router.to(z.dtype)
    if normalisation == "count":
        weights = weights / z.shape[-2]  # eq. 1
    else:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-12)  # the authors' code
    return torch.einsum("...lk,lkd->...ld", weights, z)


def save_prompts(prompts: PromptSet, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a prompt file (safetensors; metadata under the key ``mp2_prompts``), whole or not at all.

    ``dtype`` is that of the stored tensors; they are read back as float32.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(prompts, name).to(dtype) for name in prompts.meta.shapes()}
    write_tensors(path, tensors, {"mp2_prompts": json_bytes(asdict(prompts.meta)).decode()})


def load_prompts(source: str | Path, backbone: Backbone | None = None) -> PromptSet:
    """Read a prompt file, or an embedded set by name, as float32; with ``backbone``, refuse another's.

    Raises:
        UnknownNameError: neither an embedded name nor a file.
        UsageError: a path where no file is.
        FormatError: damaged file, unknown schema, wrong shapes; the message names file and field.
        MismatchError: made for another backbone; the message says which one fits.
    """
    text = str(source)
    path = EMBEDDED.get(text, Path(text))
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise UsageError(f"no prompt file '{text}' (embedded ones: {', '.join(EMBEDDED)})")
        raise UnknownNameError("prompts", text, EMBEDDED, "A prompt file (*.safetensors) works too.")
    tensors = {}
    with open_safetensors(path) as file:
        meta = read_meta((file.metadata() or {}).get("mp2_prompts"), path)
        there = set(file.keys())
        for name, shape in meta.shapes().items():
            if name not in there:
                raise FormatError(f"no tensor '{name}' in the file", path=path, field=name)
            got = tuple(file.get_slice(name).get_shape())
            if got != shape:
                raise FormatError(
                    f"has shape {got}, expected {shape} from the metadata", path=path, field=name
                )
            tensors[name] = float_tensor(file, name, path)
    prompts = PromptSet(meta=meta, **tensors)
    if backbone is not None:
        prompts.check_fits(backbone)
    return prompts


def read_meta(text: str | None, path: Path) -> PromptMeta:
    """Parse and validate the JSON metadata of a prompt file."""
    if text is None:
        raise FormatError("no 'mp2_prompts' metadata: this is not a prompt file of mp2", path=path)
    raw = parse_object(text, path, field="mp2_prompts")
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise FormatError(
            f"is {shown(version)}, this mp2 reads version {SCHEMA_VERSION}", path=path, field="schema_version"
        )
    check(raw, Fields({}, dict.fromkeys(("backbone", "backbone_sha256"), one_line)), path)
    return build(PromptMeta, raw, path)


def random_prompts(
    backbone: Backbone,
    kind: Literal["deep", "shallow"],
    *,
    n_modules: int = 8,
    prompt_tokens: int = 50,
    intrinsic_dim: int = 300,
    scale: float = 1.0,
    seed: int = 0,
    tasks: tuple[str, ...] = (),
) -> PromptSet:
    """Untrained prompts: z N(0, scale), A U(+-1/sqrt(m H)), routers N(0, 1), head N(0, 1/sqrt(H))."""
    config = backbone.config
    meta = PromptMeta(
        kind=kind,
        backbone=config.name,
        backbone_sha256=backbone.sha256,
        n_layers=config.n_layers,
        hidden=config.hidden,
        n_heads=config.n_heads,
        n_modules=n_modules,
        prompt_tokens=prompt_tokens,
        intrinsic_dim=intrinsic_dim,
        tasks=tasks,
        provenance={"made_by": "random_prompts", "seed": seed},
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = meta.shapes()
    bound = (prompt_tokens * config.hidden) ** -0.5
    return PromptSet(
        meta=meta,
        z=torch.randn(shapes["z"], generator=generator) * scale,
        projection=(torch.rand(shapes["projection"], generator=generator) * 2 - 1) * bound,
        routers=torch.randn(shapes["routers"], generator=generator),
        span_weight=torch.randn(shapes["span_weight"], generator=generator) * config.hidden**-0.5,
        span_bias=torch.zeros(2),
    )
