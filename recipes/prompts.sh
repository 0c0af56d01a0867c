#!/usr/bin/env bash
# Every prompt that the paper's Table 3 and Figures need, over one frozen backbone: MP2 deep and shallow (with and without fast and
# slow learning, Table 5), SPoT, PPT, and a span head without prompts.
#   recipes/prompts.sh BACKBONE UPSTREAM_DIR CORPUS_DIR WORK_DIR [SCALE]
# UPSTREAM_DIR: <task>/{train,dev}.jsonl. CORPUS_DIR: *.txt or *.txt.xz, a blank line after each document. SCALE divides all steps and
# multiplies the rates of MP2 (1: the paper's million steps; 1000 runs in a minute over a toy). Every step resumes. Never put chnsent,
# tnews, lcqmc, c3, the few-shot examples of amazon, or iflytek into UPSTREAM_DIR.
# TASKS in the environment: names of the upstream tasks, instead of all that have data.
set -euo pipefail
backbone=$1 upstream=$2 corpus=$3 work=$4 scale=${5:-1}
tokens=(--prompt-tokens "${PROMPT_TOKENS:-50}")
read -ra tasks <<< "${TASKS:+--tasks $TASKS}"
read -ra shape <<< "${MODULAR_OPTIONS:-}"         # of modular prompts: --modules, --intrinsic-dim ...
read -ra options <<< "${PRETRAIN_OPTIONS:-}"      # of mp2 pretrain, for all: --max-tokens, --device, --precision, --threads ...
mp2() { python -m mp2 "$@"; }
steps() { python -c "print(max(2, round($1 / $scale)))"; }
rate() { python -c "print(min(0.05, $1 * $scale ** 0.5))"; } # fewer steps, larger ones
pre() { mp2 pretrain --backbone "$backbone" "${options[@]}" "$@"; }
modular() { pre "${tokens[@]}" "${shape[@]}" "$@"; }

# 1. MP2 (appendix A.1): deep with two rates, shallow with one; the others of each kind are Table 5's
modular --deep --data "$upstream" "${tasks[@]}" --steps "$(steps 1e6)" --router-lr "$(rate 5e-4)" --prompt-lr "$(rate 1e-4)" --out "$work/deep"
modular --shallow --data "$upstream" "${tasks[@]}" --steps "$(steps 1e6)" --router-lr "$(rate 1e-3)" --prompt-lr "$(rate 1e-3)" --out "$work/shallow"
modular --deep --data "$upstream" "${tasks[@]}" --steps "$(steps 1e6)" --router-lr "$(rate 1e-4)" --prompt-lr "$(rate 1e-4)" --out "$work/deep-one-rate"
modular --shallow --data "$upstream" "${tasks[@]}" --steps "$(steps 1e6)" --router-lr "$(rate 5e-3)" --prompt-lr "$(rate 1e-3)" --out "$work/shallow-two-rates"

# 2. SPoT (650K steps, 3e-3) and PPT (400K steps, 3e-2): one soft prompt of as many rows
pre --method spot "${tokens[@]}" --data "$upstream" "${tasks[@]}" --steps "$(steps 650e3)" --out "$work/spot"
pre --method ppt "${tokens[@]}" --corpus "$corpus" --steps "$(steps 400e3)" --out "$work/ppt"

# 3. the span head alone, on the same tasks: what BBT and BBTv2 have to start from without MP2's prompts
pre --method head --data "$upstream" "${tasks[@]}" --steps "$(steps 650e3)" --out "$work/head"

# 4. stored as float16, as what ships
python - "$work" <<'PY'
import sys
from pathlib import Path

import torch

from mp2.prompts import load_prompts, save_prompts

work = Path(sys.argv[1])
for name in ("deep", "shallow", "deep-one-rate", "shallow-two-rates", "spot", "ppt", "head"):
    prompts = load_prompts(work / name / "prompts.safetensors")
    save_prompts(prompts, work / "float16" / f"{name}.safetensors", dtype=torch.float16)
PY
