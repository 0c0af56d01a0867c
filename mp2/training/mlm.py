"""Step 1 of the paper's Figure 1: self-supervised training of a backbone by masked language modelling.

15 % of the characters are predicted; of these 80 % are masked, 10 % replaced, 10 % kept (Devlin et al.,
2019).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mp2.backbone.config import BackboneConfig
from mp2.backbone.device import resolve_device
from mp2.backbone.encoder import Encoder
from mp2.backbone.load import Backbone, freeze, save_backbone
from mp2.backbone.tokenizer import Tokenizer
from mp2.errors import UsageError
from mp2.training.checkpoint import alone_in, load_checkpoint, save_checkpoint
from mp2.training.corpus import build_vocab, corpus_files, pack, ppmi_embeddings
from mp2.training.journal import drop_lines_after
from mp2.training.stop import StopSignals


@dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """How a backbone is trained; the defaults are the recipe of ``mini``."""

    n_layers: int = 4
    hidden: int = 192
    n_heads: int = 6
    ffn: int = 768
    vocab_size: int = 5300
    max_positions: int = 256
    length: int = 128
    batch_size: int = 64
    steps: int = 4000
    learning_rate: float = 1.5e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    mask_rate: float = 0.15
    ppmi_init: bool = True
    precision: str = "bf16"
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.length > self.max_positions:
            raise UsageError(
                f"--length {self.length} exceeds the {self.max_positions} positions of the backbone"
            )
        if self.length < 3:
            raise UsageError(f"--length {self.length}, expected at least 3: [CLS], a character, [SEP]")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"precision '{self.precision}', expected fp32 or bf16")
        if not 0 < self.mask_rate < 1:
            raise UsageError(f"mask rate {self.mask_rate}, expected a share between 0 and 1")
        if min(self.steps, self.batch_size) < 1:
            raise UsageError("steps and batch size must be at least 1")


class MaskedLanguageModel(nn.Module):
    """Encoder, BERT's transform, and output embeddings tied to the input's."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.transform = nn.Linear(config.hidden, config.hidden)
        self.transform_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, input_ids: Tensor, chosen: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        """Mean cross-entropy over the chosen positions.

        ``input_ids`` [N, T]; ``chosen`` [n] indices into the flattened N*T; ``targets`` [n];
        ``starts`` [N] first position of each row, so that short rows train the whole position table.
        """
        encoder = self.encoder
        positions = starts[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        positions[:, 0] = 0  # [CLS] always stands at 0
        hidden = encoder._embed(encoder.word_embeddings(input_ids), encoder.position_embeddings(positions))
        for i in range(encoder.config.n_layers):
            hidden = encoder.layer(i, hidden)
        picked = hidden.flatten(0, 1)[chosen]
        picked = self.transform_norm(F.gelu(self.transform(picked)))
        logits = F.linear(picked, encoder.word_embeddings.weight, self.bias)
        return F.cross_entropy(logits.float(), targets)


def mask_tokens(
    rows: NDArray[np.int64], rng: np.random.Generator, config: MlmConfig, mask_id: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Masked copy of ``rows`` [N, T], the chosen flat positions [n] and their targets [n]."""
    n_rows, length = rows.shape
    n_chosen = max(1, round((length - 2) * config.mask_rate))
    kth = min(n_chosen, length - 3)  # with a high rate every position may be chosen
    order = rng.random((n_rows, length - 2)).argpartition(kth, axis=1)[:, :n_chosen] + 1
    chosen = (order + np.arange(n_rows)[:, None] * length).ravel()
    flat = rows.ravel().copy()
    targets = flat[chosen].copy()
    dice = rng.random(len(chosen))
    replaced = np.where(
        dice < 0.8, mask_id, np.where(dice < 0.9, rng.integers(5, vocab_size, len(chosen)), targets)
    )
    flat[chosen] = replaced
    return flat.reshape(rows.shape), chosen, targets


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then linear to zero."""
    ramp = max(1, math.ceil(steps * warmup))
    return min((step + 1) / ramp, (steps - step) / max(1, steps - ramp))


def train_mlm(
    corpus: Path,
    out: Path,
    config: MlmConfig,
    *,
    log: Callable[[str], None],
    device: str = "cpu",
    threads: int | None = None,
) -> Backbone:
    """Train a backbone on the text files of ``corpus`` and write it, BERT form, to ``out``.

    Restartable: with a checkpoint of the same configuration in ``out`` it goes on where that ends, with the
    same losses as if never stopped. Losses go to ``out/mlm_losses.jsonl``.

    Raises:
        RunLockedError: another process trains in the same folder.
        UsageError: no text, less than a batch of it, or a checkpoint of another configuration.
        UnknownNameError, MissingDependencyError: no such device here.
    """
    where = resolve_device(device)
    with alone_in(out):
        return _train(corpus, out, config, log, threads, where)


def _train(
    corpus: Path,
    out: Path,
    config: MlmConfig,
    log: Callable[[str], None],
    threads: int | None,
    device: torch.device,
) -> Backbone:
    if threads:
        torch.set_num_threads(threads)
    files = corpus_files(corpus)
    vocab_file = out / "vocab.txt"
    if vocab_file.is_file():
        tokenizer = Tokenizer.from_folder(out)
    else:
        tokenizer = Tokenizer.from_vocab(build_vocab(files, config.vocab_size))
        vocab_file.write_text("\n".join(tokenizer.tokens()) + "\n", "utf-8")
    packed = pack(files, tokenizer, config.length, out / "cache")
    log(f"corpus: {len(packed):,} sequences of {config.length} tokens, vocabulary {tokenizer.vocab_size:,}")
    shape = BackboneConfig(
        name=out.name,
        n_layers=config.n_layers,
        hidden=config.hidden,
        n_heads=config.n_heads,
        ffn=config.ffn,
        vocab_size=tokenizer.vocab_size,
        max_positions=config.max_positions,
    )
    generator = torch.Generator().manual_seed(config.seed)
    model = MaskedLanguageModel(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.zero_()
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    settings = json.dumps(asdict(config), sort_keys=True)
    checkpoint = out / "mlm_checkpoint.safetensors"
    step = 0
    if checkpoint.is_file():
        state = load_checkpoint(checkpoint, model, optimizer)
        if state["config"] != settings:
            raise UsageError(
                f"{checkpoint} was made with another configuration; remove it or choose another --out"
            )
        step = int(state["step"])
        log(f"resumed at step {step}")
    elif config.ppmi_init:
        vectors = ppmi_embeddings(packed[:250_000], tokenizer.vocab_size, config.hidden, seed=config.seed)
        model.encoder.word_embeddings.weight.data.copy_(torch.from_numpy(vectors))
        log("token embeddings start from PPMI + SVD")
    per_epoch = len(packed) // config.batch_size
    if not per_epoch:
        raise UsageError(
            f"corpus has {len(packed)} sequences, expected at least one batch of {config.batch_size}"
        )
    started = last_save = last_log = time.monotonic()
    first_step = step
    losses = out / "mlm_losses.jsonl"
    drop_lines_after(losses, step)
    running: list[float] = []
    shuffled, order = -1, np.arange(0)
    with losses.open("a") as journal, StopSignals() as stop:
        while step < config.steps:
            epoch, index = divmod(step, per_epoch)
            if epoch != shuffled:
                order = np.random.default_rng([config.seed, 1, epoch]).permutation(len(packed))
                shuffled = epoch
            rng = np.random.default_rng([config.seed, 2, step])
            picked = np.sort(order[index * config.batch_size : (index + 1) * config.batch_size])
            rows = packed[picked].astype(np.int64)
            inputs, chosen, targets = mask_tokens(rows, rng, config, tokenizer.mask_id, tokenizer.vocab_size)
            starts = rng.integers(0, config.max_positions - config.length + 1, len(rows))
            tensors = [torch.from_numpy(a).to(device) for a in (inputs, chosen, targets, starts)]
            rate = config.learning_rate * schedule(step, config.steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = model(*tensors)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            value = float(loss.detach())
            if math.isfinite(value):
                optimizer.step()
            step += 1
            running.append(value)
            journal.write(json.dumps({"step": step, "loss": round(value, 6)}) + "\n")
            now = time.monotonic()
            if now - last_log > 20 or step == config.steps:
                pace = (step - first_step) / (now - started)
                tokens = pace * config.batch_size * config.length
                eta = (config.steps - step) / pace
                log(
                    f"step {step}/{config.steps} loss {np.mean(running):.4f} {tokens:,.0f} tokens/s "
                    f"ETA {eta / 60:.1f} min"
                )
                running, last_log = [], now
            due = now - last_save > config.checkpoint_minutes * 60 or step == config.steps
            if due or stop.received:
                journal.flush()
                save_checkpoint(checkpoint, model, optimizer, {"step": step, "config": settings})
                last_save = now
            if stop.received:
                log(f"stopped at step {step}; the same command goes on from there")
                stop.leave()
    backbone = freeze(shape, model.encoder.cpu(), tokenizer)
    save_backbone(backbone, out)
    (out / "mlm_config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    return backbone
