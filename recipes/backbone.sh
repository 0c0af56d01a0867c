#!/usr/bin/env bash
# The recipe of a label-free backbone of 6 x 256 from plain text: one CPU core, days; 300 M tokens or more.
#   recipes/backbone.sh split CORPUS_DIR WORK_DIR      hold out every 500th document
#   recipes/backbone.sh train WORK_DIR [OPTION ...]    train at a constant rate; stop it and start it as you like
#   recipes/backbone.sh ship WORK_DIR NAME [OPTION ...]    a branch of where it is, decayed, stored as float16
# CORPUS_DIR: *.txt.xz, one paragraph a line, a blank line after each document. `ship` takes a tenth of the steps so
# far, and training may go on beside it and after it. OPTIONs of mp2 pretrain-backbone win over those below; give
# both commands the same.
set -euo pipefail
command=$1
settings=(--layers 6 --hidden 256 --heads 4 --max-positions 512 --length 128 --batch-size 64 --lr 2e-3
  --warmup-steps 1500 --masking mixed --mask-rate 0.2 --contrastive 0.1 --threads 1 --compile)

split() {
  local corpus=$1 work=$2
  mkdir -p "$work/corpus" "$work/held_out"
  for file in "$corpus"/*.txt.xz; do
    xz -dc "$file"
    echo
  done | awk -v work="$work" 'BEGIN { RS = ""; ORS = "\n\n" }
    { print > (work "/" (NR % 500 ? "corpus" : "held_out") "/text.txt") }'
}

# 1. masked language modelling, with neighbouring passages pulled together; the number of steps is never reached
train() {
  local work=$1
  mp2 pretrain-backbone --corpus "$work/corpus" --out "$work/trunk" "${settings[@]}" --steps 1000000 \
    --decay-steps 0 "${@:2}"
}

# 2. the rate falls to zero over a tenth of the steps so far, from a checkpoint of the trunk
ship() {
  local work=$1 name=$2 step
  step=$(wc -l < "$work/trunk/mlm_losses.jsonl")
  mp2 pretrain-backbone --corpus "$work/corpus" --out "$work/$name" --from "$work/trunk" "${settings[@]}" \
    "${@:3}" --steps $((step + step / 10)) --decay-steps $((step / 10))
  python - "$work/$name" <<'PY'
import sys

import torch

from mp2.backbone import load_backbone, save_backbone

save_backbone(load_backbone(sys.argv[1]), sys.argv[1] + "-float16", dtype=torch.float16)
PY
}

"$command" "${@:2}"
