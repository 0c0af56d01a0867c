"""``mp2 pretrain-backbone``: a backbone from plain text by masked language modelling, restartable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mp2.backbone.config import BackboneConfig
from mp2.backbone.load import Backbone, freeze, save_backbone
from mp2.backbone.tokenizer import Tokenizer
from mp2.errors import UsageError
from mp2.files import write_json, write_text
from mp2.limits import check_new_folder, check_threads
from mp2.training.checkpoint import Preparation, alone_in, read_steps
from mp2.training.config import MlmConfig
from mp2.training.contrastive import shared_document
from mp2.training.corpus import corpus_files, file_digests, folder_tokenizer, pack, ppmi_embeddings
from mp2.training.masking import mask_tokens
from mp2.training.mlm import MaskedLanguageModel, schedule, tiny_numbers_as_zero, trainable_attention
from mp2.training.mlm_branch import branch, check_start
from mp2.training.model_card import backbone_card
from mp2.training.outputs import draw_curves
from mp2.training.ranks import Ranks, joined
from mp2.training.trainer import Trainer

CHECKPOINT = "mlm_checkpoint.safetensors"
Tensors = tuple[Tensor, ...]


class MlmTrainer(Trainer[Tensors]):
    """One masked-language-modelling run over packed sequences [n, length]."""

    model: MaskedLanguageModel

    def __init__(
        self,
        out: Path,
        config: MlmConfig,
        packed: NDArray[np.uint16],
        tokenizer: Tokenizer,
        *,
        ranks: Ranks,
        compiled: bool,
        log: Callable[[str], None],
    ) -> None:
        super().__init__(
            out,
            n_steps=config.steps,
            checkpoint=CHECKPOINT,
            journal="mlm_losses.jsonl",
            checkpoint_minutes=config.checkpoint_minutes,
            amount=config.batch_size * config.length,
            unit="tokens",
            ranks=ranks,
            log=log,
        )
        self.config, self.packed, self.tokenizer = config, packed, tokenizer
        self.n_batches = len(packed) // 2 * 2 // config.batch_size
        if not self.n_batches:
            raise UsageError(
                f"corpus has {len(packed)} sequences, expected at least one batch of {config.batch_size}"
            )
        if config.contrastive and ranks.size > 1:
            raise UsageError(
                f"--contrastive with {ranks.size} processes, expected one: it compares the rows of a batch"
            )
        if config.batch_size < ranks.size:
            raise UsageError(f"batch size {config.batch_size}, expected at least {ranks.size}: one a process")
        self._parts: tuple[Tensor, ...] = ()  # of the last loss
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.arange(0))
        self.model = MaskedLanguageModel(_shape(out.name, config, tokenizer))
        self.model.initialise(torch.Generator().manual_seed(config.seed))
        self.model.to(ranks.device).train()
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"name": "weights", "params": decayed, "weight_decay": config.weight_decay},
                {"name": "biases and norms", "params": plain, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        forward: nn.Module = torch.compile(self.model) if compiled else self.model  # type: ignore[assignment]
        self._on_ranks = ranks.wrap(forward)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed; how often one is written does not matter."""
        settings = asdict(self.config)
        del settings["checkpoint_minutes"]
        return settings | self._data_sha256

    @cached_property
    def _data_sha256(self) -> dict[str, str]:
        """Hashes of packed corpus and vocabulary; every checkpoint has them, so they are computed once."""
        vocabulary = "\n".join(self.tokenizer.tokens()).encode()
        return {
            "corpus": hashlib.sha256(np.ascontiguousarray(self.packed).data).hexdigest(),
            "vocabulary": hashlib.sha256(vocabulary).hexdigest(),
        }

    @torch.no_grad()
    def start_from_ppmi(self) -> None:
        """Token embeddings from PPMI and SVD, the main process's in all of them.

        Last bits of an SVD depend on the machine, and DistributedDataParallel made the weights equal before.
        """
        config, embeddings = self.config, self.model.encoder.word_embeddings.weight
        if self.ranks.main:
            size = self.tokenizer.vocab_size
            vectors = ppmi_embeddings(self.packed[:250_000], size, config.hidden, seed=config.seed)
            embeddings.copy_(torch.from_numpy(vectors))
        self.ranks.share(embeddings)
        self.log("token embeddings start from PPMI + SVD")

    def make_batch(self, step: int) -> Tensors:
        """This process's rows of a step: masked ids [N, T], chosen positions [n], targets [n], starts [N].

        With the contrastive term also the tokens that each row shares its document for, [N, T].
        """
        config, ranks = self.config, self.ranks
        epoch, index = divmod(step, self.n_batches)
        if epoch != self._order[0]:
            pairs = np.random.default_rng([config.seed, 1, epoch]).permutation(len(self.packed) // 2)
            self._order = epoch, (2 * pairs[:, None] + np.arange(2)).ravel()
        rng = np.random.default_rng([config.seed, 2, step])
        picked = np.sort(self._order[1][index * config.batch_size : (index + 1) * config.batch_size])
        rows = self.packed[picked].astype(np.int64)
        inputs, chosen, targets = mask_tokens(
            rows, rng, config.masking, config.mask_rate, self.tokenizer.mask_id, self.tokenizer.vocab_size
        )
        starts = rng.integers(0, config.max_positions - config.length + 1, len(rows))
        starts[rng.random(len(rows)) < 0.5] = 0  # where texts begin that have no inline prompt before them
        if ranks.size > 1:
            own = np.arange(ranks.rank, len(rows), ranks.size)
            within = chosen.reshape(len(rows), -1) - np.arange(len(rows))[:, None] * config.length
            chosen = (within[own] + np.arange(len(own))[:, None] * config.length).ravel()
            inputs, starts = inputs[own], starts[own]
            targets = targets.reshape(len(rows), -1)[own].ravel()
        shared = [shared_document(rows, self.tokenizer.sep_id)] if config.contrastive else []
        return tuple(torch.from_numpy(a) for a in (inputs, chosen, targets, starts, *shared))

    def loss(self, batch: Tensors) -> Tensor:
        """This process's share of the batch's mean loss: every row has as many chosen positions."""
        device = self.ranks.device
        tensors = [t.to(device) for t in batch]
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with autocast, trainable_attention(device):
            self._parts = self._on_ranks(*tensors)
        total = self._parts[0]
        if self.config.contrastive:
            total = total + self.config.contrastive * self._parts[1]
        return total * (len(batch[0]) / self.config.batch_size)

    def notes(self, batch: Tensors) -> dict[str, Any]:
        """The two terms, where there are two."""
        if not self.config.contrastive:
            return {}
        predicted, pulled = (round(float(part.detach()), 6) for part in self._parts)
        return {"mlm": predicted, "contrastive": pulled}

    def clip(self) -> Tensor:
        """Limit the gradients to norm 1."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def rates(self) -> Sequence[float]:
        """The scheduled rate, for both groups."""
        config = self.config
        share = schedule(self.step, self.n_steps, config.warmup_steps, config.decay_steps)
        rate = config.learning_rate * share
        return rate, rate


@tiny_numbers_as_zero()
def train_mlm(
    corpus: str | Path,
    out: str | Path,
    config: MlmConfig,
    *,
    log: Callable[[str], None],
    start: str | Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    compiled: bool | None = None,
    command: str | None = None,
) -> Backbone:
    """Train a backbone on the text files of ``corpus`` and write it, BERT form, to ``out``.

    Restartable: with a checkpoint of the same configuration in ``out`` it goes on where that ends, with the
    same losses as if never stopped. Without one it begins where the run in the folder ``start`` is, if given.
    Losses go to ``out/mlm_losses.jsonl``, the curve to ``curves.png``, ``command`` into the model card.
    ``compiled`` uses ``torch.compile`` (None: on GPUs). Under ``torchrun`` all its processes share the work.

    Raises:
        RunLockedError: another process trains in the same folder.
        UsageError: no text, less than a batch of it, or a vocabulary of something else in ``out``; the folder
            is as it was.
        MismatchError: a checkpoint of another configuration, or ``start`` has another vocabulary.
        UnknownNameError, MissingDependencyError: no such device here.
    """
    corpus, out = Path(corpus), Path(out)
    files = corpus_files(corpus)
    check_new_folder(out)
    check_threads(threads)
    if threads:
        torch.set_num_threads(threads)
    before = Preparation(out)
    with joined(device) as ranks, alone_in(out) if ranks.main else nullcontext():
        say = log if ranks.main else lambda _: None
        with before.undone() if ranks.main else nullcontext():
            digests = file_digests(files)  # now: a file may change while the run goes on
            with ranks.main_first():  # the others find vocabulary and packed sequences
                begun = (out / CHECKPOINT).is_file()
                tokenizer = folder_tokenizer(files, digests, out, config.vocab_size, begun=begun, say=say)
                packed = pack(files, tokenizer, config.length, out / "cache")
            say(
                f"corpus: {len(packed):,} sequences of {config.length} tokens, "
                f"vocabulary {tokenizer.vocab_size:,}"
            )
            wanted = ranks.device.type == "cuda" if compiled is None else compiled
            run = MlmTrainer(out, config, packed, tokenizer, ranks=ranks, compiled=wanted, log=say)
            if start is not None and not begun:
                check_start(run, Path(start))
        with run.resumed() as resumed:
            if not resumed and start is not None:
                branch(run, Path(start))
            elif not resumed and config.ppmi_init:
                run.start_from_ppmi()
            if ranks.main:
                write_json(out / "mlm_config.json", asdict(config), indent=1)
            run.train()
        model = run.model.cpu()
        backbone = replace(freeze(model.encoder.config, model.encoder, tokenizer), mlm_head=model.head())
        if ranks.main:
            _write(run, backbone, digests, command)
        return backbone


def _write(
    run: MlmTrainer, backbone: Backbone, digests: Sequence[tuple[str, int, str]], command: str | None
) -> None:
    """Write the backbone's folder, curve, numbers and card."""
    out, config = run.out, run.config
    save_backbone(backbone, out)
    draw_curves(out / "curves.png", run.journal, f"{backbone.name}: masked language modelling")
    lines = [line["loss"] for line in read_steps(run.journal)]
    part = max(1, len(lines) // 20)
    first, last = ([x for x in half if x is not None] for half in (lines[:part], lines[-part:]))
    facts: dict[str, Any] = {
        "sequences": len(run.packed),
        "seconds": run.seconds,
        "skipped_steps": run.skipped,
        "first_loss": float(np.mean(first)) if first else None,
        "last_loss": float(np.mean(last)) if last else None,
        "tokens_per_s": round(config.steps * config.batch_size * config.length / run.seconds, 1),
        "data_wait_share": round(run.wait_share, 5),
    }
    write_json(out / "mlm_result.json", facts, indent=1)
    facts["files"] = digests
    write_text(out / "model_card.md", backbone_card(backbone, config, run.ranks, command, facts))


def _shape(name: str, config: MlmConfig, tokenizer: Tokenizer) -> BackboneConfig:
    return BackboneConfig(
        name=name,
        n_layers=config.n_layers,
        hidden=config.hidden,
        n_heads=config.n_heads,
        ffn=config.ffn,
        vocab_size=tokenizer.vocab_size,
        max_positions=config.max_positions,
    )
