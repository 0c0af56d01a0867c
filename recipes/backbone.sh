#!/usr/bin/env bash
# The recipe of a label-free backbone of 6 x 256 from plain text: one CPU core, days; 300 M tokens or more.
#   recipes/backbone.sh split CORPUS_DIR WORK_DIR         hold out every 500th document
#   recipes/backbone.sh train WORK_DIR [OPTION ...]       train at a constant rate; stop it and start it as you like
#   recipes/backbone.sh lengthen WORK_DIR [OPTION ...]    a branch of where it is, on rows of 512 tokens
#   recipes/backbone.sh ship WORK_DIR NAME [OPTION ...]   a branch of `long`, else of the trunk, decayed, as float16
# CORPUS_DIR: *.txt.xz, one paragraph a line, a blank line after each document. `lengthen` takes a twentieth of the
# steps so far and `ship` a tenth; training may go on beside them and after them. Rows of 128 tokens begin anywhere
# in the position table, so that all 512 positions are trained without `lengthen`, but attention over more than 128
# tokens is not. OPTIONs of mp2 pretrain-backbone win over those below; give all commands the same.
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

# 2. as many tokens a step in rows four times as long, at the trunk's rate
lengthen() {
  local work=$1 step
  step=$(wc -l < "$work/trunk/mlm_losses.jsonl")
  mp2 pretrain-backbone --corpus "$work/corpus" --out "$work/long" --from "$work/trunk" "${settings[@]}" \
    --length 512 --batch-size 16 "${@:2}" --steps $((step + step / 20)) --decay-steps 0
}

# 3. the rate falls to zero over a tenth of the steps so far, from a checkpoint of `long` where there is one
ship() {
  local work=$1 name=$2 from=trunk step rows=()
  if [ -f "$work/long/mlm_result.json" ]; then from=long rows=(--length 512 --batch-size 16); fi
  step=$(wc -l < "$work/$from/mlm_losses.jsonl")
  mp2 pretrain-backbone --corpus "$work/corpus" --out "$work/$name" --from "$work/$from" "${settings[@]}" \
    "${rows[@]}" --steps $((step + step / 10)) --decay-steps $((step / 10)) "${@:3}"
  python - "$work/$name" <<'PY'
import sys

import torch

from mp2.backbone import load_backbone, save_backbone

save_backbone(load_backbone(sys.argv[1]), sys.argv[1] + "-float16", dtype=torch.float16)
PY
}

"$command" "${@:2}"
