"""What stays as it is while prompts are tuned: backbone, modular prompts and the backend, found by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mp2.environment import data_folder
from mp2.errors import MismatchError, UsageError
from mp2.optimizers.config import Kind, RouterConfig
from mp2.optimizers.router_search import Routers, check_method
from mp2.optimizers.two_stage import Prompt, Space
from mp2.runs.config import BbtConfig
from mp2.runs.scratch import ON_THE_FLY, made_on_the_fly

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.engine import Backend
    from mp2.prompts import PromptSet


@dataclass(frozen=True)
class FrozenModel:
    """Backbone, modular prompts and the backend that runs them; shared by the seeds of a series."""

    backbone: Backbone
    prompts: PromptSet
    backend: Backend

    @property
    def kind(self) -> Kind:
        """Deep or shallow."""
        return "shallow" if self.prompts.kind == "shallow" else "deep"

    def max_tokens(self, requested: int | None) -> int:
        """See `sequence_length`."""
        positions, meta = self.backbone.config.max_positions, self.prompts.meta
        return sequence_length(requested, positions, self.kind, meta.n_inline)

    def fuse(self, router: Routers) -> Prompt:
        """Fused intrinsic prompts [L', d] of a router [L', K] (eq. 1)."""
        import torch

        z = self.prompts.fuse(torch.from_numpy(np.ascontiguousarray(router)))
        return np.ascontiguousarray(z.detach().cpu().numpy(), dtype=np.float32)

    def space(self) -> Space:
        """The prompts as what is searched."""
        from mp2.prompts import hard_router

        n_layers, n_modules, n_dims = self.prompts.z.shape
        warm = hard_router(self.prompts.routers).cpu().numpy().reshape(-1, n_layers, n_modules)
        return Space(
            kind=self.kind, n_layers=n_layers, n_modules=n_modules, n_dims=n_dims, fuse=self.fuse, warm=warm
        )


def sequence_length(requested: int | None, positions: int, kind: Kind, n_inline: int) -> int:
    """Tokens that a sequence may have; inline prompts take ``n_inline`` of the backbone's positions."""
    from mp2.tasks.lengths import tokens_allowed

    what = f"{kind} inline" if kind == "deep" and n_inline else kind
    return tokens_allowed(requested, positions - n_inline, f" with {what} prompts")


def check_kind(config: BbtConfig, kind: str) -> None:
    """Raise ``MismatchError`` where the prompts are of another ``kind`` than the config asks for."""
    if config.kind not in ("auto", kind):
        raise MismatchError(
            f"the prompts of {default_prompts(config)} are {kind}, expected {config.kind}: "
            f"drop --{config.kind} or give other --prompts"
        )


def default_prompts(config: BbtConfig) -> str:
    """The prompts' name: what was asked for, the embedded ones of the backbone, or made from scratch.

    Raises:
        UnknownNameError: no such backbone.
    """
    from mp2.backbone.load import check_backbone_name

    if config.prompts is not None:
        return config.prompts
    kind = "shallow" if config.kind == "shallow" else "deep"
    if config.backbone != "mini":
        check_backbone_name(config.backbone)
        return f"scratch-{kind}"
    return f"mini-{kind}"


def resolve_paths(config: BbtConfig) -> BbtConfig:
    """The config with absolute paths, MP2_DATA and full method names: it can be run again from anywhere."""
    import torch

    from mp2.backbone.load import EMBEDDED as BACKBONES
    from mp2.prompts.prompt_set import EMBEDDED as PROMPTS
    from mp2.tasks.place import HUB_PREFIX

    data = config.data or data_folder()
    if data and not config.data and not data.startswith(HUB_PREFIX) and not Path(data).exists():
        raise UsageError(f"MP2_DATA: there is no folder {data}")
    prompts = default_prompts(config)
    return replace(
        config,
        task=_absolute(config.task) if config.task.endswith(".toml") else config.task,
        data=_absolute(data) if data else None,
        backbone=_absolute(config.backbone, BACKBONES),
        prompts=_absolute(prompts, [*PROMPTS, *ON_THE_FLY]),
        engine=_absolute(config.engine) if config.engine else None,
        router=_router(config.router, prompts),
        threads=config.threads or torch.get_num_threads(),  # sums depend on it in their last bits
    )


def _router(router: RouterConfig, prompts: str) -> RouterConfig:
    """Stage I with the method's full name; none where no module was trained, and no method asked for."""
    if prompts in ON_THE_FLY and router == RouterConfig():
        return replace(router, method="none")
    return replace(router, method=check_method(router.method))


def _absolute(name: str, embedded: Collection[str] = ()) -> str:
    """A path if there is something there, else the name as it is; a name of the package's own stays one."""
    return str(Path(name).resolve()) if name not in embedded and Path(name).exists() else name


def run_prompts(config: BbtConfig, backbone: Backbone) -> PromptSet:
    """The modular prompts that the config names, read or made from scratch."""
    from mp2.prompts import load_prompts

    name = default_prompts(config)
    return made_on_the_fly(backbone, name) if name in ON_THE_FLY else load_prompts(name, backbone)


def load_model(config: BbtConfig) -> FrozenModel:
    """Load what a run needs besides data.

    Raises:
        UsageError: unknown names, missing packages, files that do not fit each other.
    """
    from mp2.backbone import load_backbone
    from mp2.engine import create_backend
    from mp2.engine.folder import MANIFEST

    if config.engine and not (Path(config.engine) / MANIFEST).is_file():
        raise UsageError(
            f"--engine {config.engine}: no {MANIFEST} there; give a folder that mp2 export wrote"
        )
    backbone = load_backbone(config.backbone, revision=config.revision)
    prompts = run_prompts(config, backbone)
    check_kind(config, prompts.kind)
    backend = create_backend(
        config.runtime,
        backbone,
        engine_dir=Path(config.engine) if config.engine else None,
        device=config.device,
        threads=config.threads,
        precision=config.precision,
        endpoint=config.endpoint,
        endpoint_patience_s=config.endpoint_patience_s,
    )
    return FrozenModel(backbone, prompts, backend)
