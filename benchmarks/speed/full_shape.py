"""The product at the full shape of CPT-large (24 layers, 1024 wide), random weights, and its peak memory.

The real weights cannot be downloaded everywhere; this writes a checkpoint in the published format (BART-form
config.json, ``model.encoder.*`` beside a generation decoder that must be ignored, BERT vocabulary) and random
prompts of the paper's sizes (K = 8, m = 50, d = 300), then runs, as a user would,

    mp2 export --backbone FOLDER --out FOLDER
    mp2 bbt --backbone FOLDER --prompts FILE --engine FOLDER --iters 20

and records exit status, seconds and peak resident memory of each. Needs about 8 GB of disk.

    python -m benchmarks.speed.full_shape --work FOLDER [--task lcqmc --data DIR] [--layers 24]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from mp2.backbone import BackboneConfig, load_backbone
from mp2.backbone.checkpoint import checkpoint_names, expected_shapes
from mp2.prompts import random_prompts, save_prompts

HIDDEN, HEADS, VOCAB, POSITIONS = 1024, 16, 51271, 1024


def vocabulary() -> list[str]:
    """As many tokens as CPT has: special ones, single characters, and the rest unused."""
    characters = [chr(c) for c in range(0x4E00, 0x9FA6)] + list(
        "，。！？：；、“”‘’（）《》0123456789abcdefghijklmnopqrstuvwxyz"
    )
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    return vocab + [f"[unused{i}]" for i in range(VOCAB - len(vocab))]


def write_checkpoint(folder: Path, n_layers: int) -> None:
    """Write random weights in CPT's published format."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "bart",
        "architectures": ["CPTForConditionalGeneration"],
        "d_model": HIDDEN,
        "encoder_layers": n_layers,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": 4 * HIDDEN,
        "decoder_layers": 4,
        "activation_function": "gelu",
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", "utf-8")
    shape = BackboneConfig(
        name="cpt-large-random",
        n_layers=n_layers,
        hidden=HIDDEN,
        n_heads=HEADS,
        ffn=4 * HIDDEN,
        vocab_size=VOCAB,
        max_positions=POSITIONS,
    )
    shapes, names = expected_shapes(shape), checkpoint_names(n_layers)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for ours, theirs in names.items():
        tensor = torch.randn(shapes[ours], generator=generator) * 0.02
        tensors[f"model.encoder.{theirs}"] = tensor + 1 if "norm.weight" in ours else tensor
    for i in range(4):  # the generation decoder: read past, never loaded
        tensors[f"model.decoder.layers.{i}.fc1.weight"] = torch.zeros(4 * HIDDEN, HIDDEN)
    save_file(tensors, folder / "model.safetensors")


def run(command: list[str]) -> dict[str, Any]:
    """Run ``mp2 ...``; exit status, seconds, peak memory in GiB (of that process alone)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "mp2", *command], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    print(output, flush=True)
    return {
        "command": "mp2 " + " ".join(Path(word).name if word.startswith("/") else word for word in command),
        "exit_status": process.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


@one_line_errors()
def main() -> None:
    """Make the checkpoint, export it, tune on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, about 8 GB")
    parser.add_argument("--task", default="demo_sentiment")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--iters", type=int, default=20)
    args = parser.parse_args()
    folder, engine, prompts = (
        args.work / "cpt-large-random",
        args.work / "engine",
        args.work / "prompts.safetensors",
    )
    write_checkpoint(folder, args.layers)
    backbone = load_backbone(folder)
    save_prompts(random_prompts(backbone, "deep", prompt_tokens=50, intrinsic_dim=300, seed=1), prompts)
    del backbone
    shutil.rmtree(engine, ignore_errors=True)
    data = ["--data", str(args.data)] if args.data else []
    rows = [run(["export", "--backbone", str(folder), "--out", str(engine)])]
    rows.append(
        run(
            f"bbt --task {args.task} --backbone {folder} --prompts {prompts} --engine {engine} "
            f"--runtime onnxruntime --iters {args.iters} --router-iters 10 --test-limit 8 "
            f"--out {args.work / 'runs'}".split()
            + data
        )
    )
    for row in rows:
        name = " ".join(row["command"].split()[:2])
        print(f"{name}: exit {row['exit_status']}, {row['seconds']} s, peak {row['peak_gib']} GiB")
    print("written:", save("full_shape", rows))


if __name__ == "__main__":
    main()
