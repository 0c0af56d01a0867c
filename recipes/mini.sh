#!/usr/bin/env bash
# The recipe of everything that ships, the label-free backbone `mini` and MP2's prompts over it, and of the prompts that Table 3 compares.
#   recipes/mini.sh CORPUS_DIR UPSTREAM_DIR WORK_DIR [SCALE]
# CORPUS_DIR: *.txt.xz, one paragraph a line, a blank line after each document. UPSTREAM_DIR: <task>/{train,dev}.jsonl. SCALE divides all
# steps (1: what ships; one CPU core, about six hours). Every step resumes: start it again.
# BACKBONE_OPTIONS and PRETRAIN_OPTIONS in the environment win over those below.
# The result: WORK_DIR/mini goes to mp2/backbone/mini, WORK_DIR/shipped to mp2/prompts/mini; conform.sh takes WORK_DIR/prompts.
set -euo pipefail
here=$(dirname "$0") corpus=$1 data=$2 work=$3 scale=${4:-1}
read -ra options <<< "${BACKBONE_OPTIONS:-}"
read -ra given <<< "${PRETRAIN_OPTIONS:-}"
steps() { echo $(($1 / scale > 2 ? $1 / scale : 2)); }
first=(waimai online_shopping weibo_sentiment thucnews toutiao_tc nlpcc2017_news bq covid_pairs cote_mfw cote_dp)
tasks=(waimai online_shopping weibo_sentiment bdci_car_sentiment book_review douban_comment thucnews toutiao_tc nlpcc2017_news kuake_qic
  smp2019_domain bq afqmc covid_pairs atec cmnli cnsd_snli cote_mfw cote_dp ccpm)
upstream=(--data "$data" --tasks "${tasks[@]}")
rows=(--prompt-tokens 16)
shape=("${rows[@]}" --intrinsic-dim 64 --router-normalisation sum)
pre() {
  mp2 pretrain --backbone "$work/mini" --max-tokens 128 --batch-size 16 --precision bf16 --threads 1 --schedule linear --warmup-steps 50 \
    --dev-limit 100 "$@" "${given[@]}"
}

# 1. the backbone, without labels: 57 M tokens at a constant rate, then a branch that decays, as float16 (stages: backbone.sh)
if [ ! -f "$work/split" ]; then
  "$here/backbone.sh" split "$corpus" "$work"
  touch "$work/split"
fi
"$here/backbone.sh" train "$work" "${options[@]}" --steps "$(steps 6945)"
"$here/backbone.sh" ship "$work" decayed "${options[@]}" --steps $(($(steps 6945) + $(steps 600))) --decay-steps "$(steps 600)"
rm -rf "$work/mini"
cp -r "$work/decayed-float16" "$work/mini"

# 2. MP2 over it, frozen: deep on ten tasks, then on all; shallow
pre --deep "${shape[@]}" --data "$data" --tasks "${first[@]}" --out "$work/deep-first" --steps "$(steps 1500)" --router-lr 0.05 --prompt-lr 5e-3
pre --deep "${shape[@]}" --data "$data" --tasks "${first[@]}" --out "$work/deep-longer" --init "$work/deep-first/prompts.safetensors" \
  --steps "$(steps 7000)" --router-lr 0.05 --prompt-lr 2e-3
pre --deep "${shape[@]}" "${upstream[@]}" --out "$work/prompts/deep" --init "$work/deep-longer/prompts.safetensors" --steps "$(steps 16000)" \
  --router-lr 0.03 --prompt-lr 2e-3
pre --shallow "${shape[@]}" "${upstream[@]}" --out "$work/prompts/shallow" --steps "$(steps 8000)" --router-lr 0.05 --prompt-lr 5e-3

# 3. what Table 3 compares them with: SPoT and PPT, in the paper's proportions to the shallow prompts' steps, and a span head alone
pre --method head "${upstream[@]}" --out "$work/prompts/head" --steps "$(steps 5200)" --prompt-lr 5e-3
pre --method spot "${rows[@]}" "${upstream[@]}" --out "$work/prompts/spot" --steps "$(steps 5200)" --prompt-lr 5e-3
pre --method ppt "${rows[@]}" --corpus "$work/corpus" --out "$work/prompts/ppt" --steps "$(steps 3200)"

# 4. prompts as float16
python - "$work" <<'PY'
import sys
from pathlib import Path

import torch

from mp2.prompts import load_prompts, save_prompts

work = Path(sys.argv[1])
for kind in ("deep", "shallow"):
    prompts = load_prompts(work / "prompts" / kind / "prompts.safetensors")
    save_prompts(prompts, work / "shipped" / f"{kind}.safetensors", dtype=torch.float16)
PY
