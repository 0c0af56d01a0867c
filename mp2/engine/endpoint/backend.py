"""The backend of ``mp2 bbt --endpoint``: the backbone is behind servers, which take prompts.

The setting that black-box tuning was made for (Sun et al. 2022, "Black-Box Tuning for
Language-Model-as-a-Service"). A candidate is a prompt in a request with a batch of examples; the requests of
a population are sent at once, to as many servers as are named. A server has the whole graph: a visit of one
layer runs all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mp2.backbone import Backbone
from mp2.engine.backend import CACHE_BYTES, Probe
from mp2.engine.chain import Bucket, buckets_of, most_candidates
from mp2.engine.endpoint.client import Endpoints
from mp2.engine.endpoint.views import head_inputs, view_of
from mp2.engine.forward import Arrival, Batch, Evaluation, Forward
from mp2.errors import MismatchError
from mp2.heads import Head
from mp2.messages import say
from mp2.prompts import PrefixProjector, PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

PREFIX_MODEL, INLINE_MODEL = "backbone", "backbone_inline"  # the graphs' names on a server
_TOKENS = 4096  # of a request: enough that a server's forward is longer than the way to it
Feeds = dict[str, np.ndarray]


class EndpointBackend:
    """Servers of one bundle or engine folder; their answers are read on this CPU."""

    name = "endpoint"
    device = "cpu"
    deep_inline = False  # the graphs of a whole backbone take keys and values

    def __init__(
        self,
        backbone: Backbone,
        urls: str,
        *,
        patience_s: float = 60.0,
        note: Callable[[str], None] = say,
    ) -> None:
        """Ask the servers at ``urls`` (with commas) what they serve; ``note`` hears of one that is silent.

        Raises UsageError (no address, no server of the protocol), EndpointError (no answer for
        ``patience_s``), MismatchError (another backbone's graph).
        """
        self.backbone = backbone
        self.endpoints = Endpoints([url.strip().rstrip("/") for url in urls.split(",")], patience_s, note)
        self._models = {PREFIX_MODEL: self._found(PREFIX_MODEL)}
        about = self._models[PREFIX_MODEL].get("parameters", {})
        # one prompt may stand for all rows of a request to 'mp2 serve'; others want one for each
        self.shares_prompts = "backbone_sha256" in about
        if not self.shares_prompts:
            note(f"{urls} does not say whose weights it has: expected those of '{backbone.config.name}'")
        self.request_tokens = min(_TOKENS, int(about.get("max_tokens", _TOKENS)))
        self.precision = str(about.get("precision", "fp32"))
        n = len(self.endpoints.urls)
        self.reason = f"asked for; {n} server{'s' if n > 1 else ''}"

    def forward(
        self,
        prompts: PromptSet,
        head: Head | None = None,
        *,
        micro_batch_tokens: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> EndpointForward:
        """See `Backend.forward`; a micro-batch is a request."""
        model = INLINE_MODEL if prompts.meta.n_inline else PREFIX_MODEL
        if model not in self._models:
            self._models[model] = self._found(model)
        return EndpointForward(self, prompts, head, micro_batch_tokens or self.request_tokens, cache_bytes)

    def side_by_side(self, batch_tokens: int) -> int:
        """See `Backend.side_by_side`: a population keeps the servers busy."""
        return 1

    def share(self, n_runs: int) -> None:
        """See `Backend.share`."""

    def probe(self, probe: Probe) -> Callable[[], object]:
        """Return what runs the whole graph on ``probe``: a server runs no layer alone."""
        config, n, t = self.backbone.config, probe.n_examples, probe.n_tokens
        keys = np.zeros(
            (1, config.n_layers, config.n_heads, probe.prompt_tokens, config.head_size), np.float32
        )
        feeds: Feeds = {
            "input_ids": np.zeros((n, t), np.int64),
            "attention_mask": np.ones((n, t), np.int64),
            "segments": np.zeros((n, 1, 2), np.int64),
            "prompt_keys": keys,
            "prompt_values": keys,
            "prompt_length": np.array([0 if probe.inline else probe.prompt_tokens]),
            **head_inputs(None, config.hidden),
        }

        def run() -> None:
            asked = [self.send(PREFIX_MODEL, feeds, ["start_logits"]) for _ in range(probe.n_candidates)]
            for answer in asked:
                answer()

        return run

    def send(self, model: str, feeds: Feeds, outputs: list[str]) -> Callable[[], Feeds]:
        """Begin to ask for ``outputs``; the result waits for them. Prompts and head are [1, ...]."""
        if not self.shares_prompts:
            n = len(feeds["input_ids"])
            feeds = {name: x if len(x) == n else np.repeat(x, n, 0) for name, x in feeds.items()}
            feeds["prompt_length"] = feeds["prompt_length"][:, None]  # a batch of Triton's has two axes
        return self.endpoints.infer(model, feeds, outputs).result

    def _found(self, model: str) -> dict[str, Any]:
        """Return what the servers say of ``model``; MismatchError where its inputs are not the backbone's."""
        found, config = self.endpoints.metadata(model), self.backbone.config
        about = found.get("parameters", {})
        url, again = self.endpoints.urls[0], "serve a bundle or an engine folder of that one"
        if (sha256 := about.get("backbone_sha256", self.backbone.sha256)) != self.backbone.sha256:
            raise MismatchError(
                f"{url} serves backbone '{about.get('backbone')}' (weights {sha256[:12]}), expected "
                f"'{config.name}' (weights {self.backbone.sha256[:12]}): {again}"
            )
        wanted = {"prompt_rows": [-1, -1, config.hidden]}
        if model == PREFIX_MODEL:
            wanted = {"prompt_keys": [-1, config.n_layers, config.n_heads, -1, config.head_size]}
        declared = {x.get("name"): x.get("shape") for x in found.get("inputs", [])}
        for name, shape in wanted.items():
            if declared.get(name) != shape:
                raise MismatchError(
                    f"model '{model}' of {url} takes {name} of shape {declared.get(name)}, expected {shape} "
                    f"for backbone '{config.name}': {again}"
                )
        return found


class EndpointForward(Forward):
    """Candidates in requests: each with its prompt and a batch of examples."""

    queues = True

    def __init__(
        self,
        backend: EndpointBackend,
        prompts: PromptSet,
        head: Head | None,
        micro_batch_tokens: int,
        cache_bytes: int,
    ) -> None:
        super().__init__(backend, prompts, head, micro_batch_tokens, cache_bytes)
        self._config, self._servers = backend.backbone.config, backend
        self._projector = PrefixProjector(backend.backbone.encoder, prompts)
        self._view = view_of(self.head)
        self._head_inputs = head_inputs(self.head, self._config.hidden)
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the incumbent's, by layer

    def chunk_of_candidates(self) -> int:
        """See `Forward.chunk_of_candidates`; here by the memory of their keys and values."""
        return most_candidates(self.prompts)

    def every_layer(self, z: torch.Tensor, *, scoring: bool = False) -> Evaluation:
        """See `Forward.every_layer`."""
        if not self.prefixed:
            rows = self._projector.inline(z[:, 0]).float().numpy()  # [P, m, H]
            return self._run(INLINE_MODEL, {"prompt_rows": rows}, len(z), scoring)
        layers = [self._projector.keys_values(i, z[:, i]) for i in range(self.n_layers)]
        return self._run(PREFIX_MODEL, self._stacked(layers, len(z)), len(z), scoring)

    def visit(self, layer: int, z: torch.Tensor) -> Evaluation:
        """See `Forward.visit`; the server runs the layers below, too."""
        own = self._projector.keys_values(layer, z)
        layers = [own if i == layer else self._held[i] for i in range(self.n_layers)]
        return self._run(PREFIX_MODEL, self._stacked(layers, len(z)), len(z), scoring=False)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Inputs of layers are not cached here."""
        raise NotImplementedError("a server has no layer alone")

    def advance(self, batch: Batch, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Inputs of layers are not cached here."""
        raise NotImplementedError("a server has no layer alone")

    def _hold(self, layer: int, z: torch.Tensor) -> None:
        self._held[layer] = self._projector.keys_values(layer, z)

    def _batches(self, inputs: Sequence[MrcInput], n_candidates: int) -> list[Bucket]:
        return buckets_of(self, inputs, 1)  # a request has one candidate

    def _stacked(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], n_candidates: int) -> Feeds:
        """Return keys and values [P, L, h, m, d_h]; zeros at layers that the head does not read."""
        config, feeds = self._config, {}
        shape = (
            n_candidates,
            config.n_layers,
            config.n_heads,
            self.prompts.meta.prompt_tokens,
            config.head_size,
        )
        for k, name in enumerate(("prompt_keys", "prompt_values")):
            feeds[name] = np.zeros(shape, np.float32)
            for i, pair in enumerate(layers):
                feeds[name][:, i] = pair[k].float().numpy()
        return feeds

    def _run(self, model: str, prompts: Feeds, n_candidates: int, scoring: bool) -> Evaluation:
        view = self._view
        length = np.array([self.prompts.meta.prompt_tokens], np.int64)

        def run(batch: Batch, candidates: slice, *, again: bool = True) -> Arrival:
            assert isinstance(batch, Bucket)
            ids = batch.input_ids.numpy()
            mask = np.ones_like(ids) if batch.mask is None else batch.mask.numpy().astype(np.int64)
            feeds = {"input_ids": ids, "attention_mask": mask, "segments": view.segments(batch)}
            feeds |= self._head_inputs | {"prompt_length": length}
            asked = []
            for k in range(*candidates.indices(n_candidates)):
                own = {name: x[k : k + 1] for name, x in prompts.items()}
                asked.append(self._servers.send(model, feeds | own, view.outputs))

            def arrive() -> np.ndarray:
                read = view.reader.scoring_outputs if scoring else view.reader.training_outputs
                return np.concatenate([read(view.states(answer(), batch)).numpy() for answer in asked])

            return arrive

        return run
