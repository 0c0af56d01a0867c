#!/usr/bin/env bash
# The recipe of the embedded backbone `mini` and its prompts: one CPU core, about two hours.
#   recipes/mini.sh CORPUS_DIR UPSTREAM_DIR WORK_DIR [SCALE]
# CORPUS_DIR: *.txt.xz, one paragraph a line. UPSTREAM_DIR: <task>/{train,dev}.jsonl. SCALE divides all steps (1: what
# ships). Every step resumes.
set -euo pipefail
corpus=$1 data=$2 work=$3 scale=${4:-1}
steps() { echo $(($1 / scale > 2 ? $1 / scale : 2)); }
joint=(waimai online_shopping weibo_sentiment douban_comment book_review thucnews toutiao_tc nlpcc2017_news
  kuake_qic bq covid_pairs ccpm cote_mfw cote_dp cmrc2018)
tasks=(waimai online_shopping weibo_sentiment douban_comment book_review cold bdci_car_sentiment thucnews
  toutiao_tc nlpcc2017_news fudan_tc kuake_qic bdci_car_subject smp2020_usual bq cote_mfw cote_dp)
shape=(--prompt-tokens 16 --intrinsic-dim 64 --max-tokens 128 --precision bf16 --threads 1 --schedule linear)

# 1. self-supervised: masked language modelling
mp2 pretrain-backbone --corpus "$corpus" --out "$work/mlm" --layers 4 --hidden 128 --heads 4 --steps "$(steps 3600)" \
  --batch-size 32 --lr 1e-3 --threads 1

# 2. second backbone stage: all weights, on upstream reading comprehension, beside the prompts
mp2 pretrain --backbone "$work/mlm" --data "$data" --tasks "${joint[@]}" --out "$work/joint" "${shape[@]}" \
  --steps "$(steps 4400)" --warmup-steps 100 --router-lr 0.03 --prompt-lr 2e-3 --backbone-lr 1e-3 --dev-limit 100

# 3. third backbone stage: also every classification task with the next option as its answer, so that the prompts count
mp2 pretrain --backbone "$work/joint/backbone" --init "$work/joint/prompts.safetensors" --data "$data" \
  --tasks "${tasks[@]}" --rotated --out "$work/steer" "${shape[@]}" --steps "$(steps 9500)" --warmup-steps 50 \
  --router-lr 0.05 --prompt-lr 3e-3 --backbone-lr 8e-4 --dev-limit 100

# 4. stored as float16; from here on the backbone is frozen
python - "$work" <<'PY'
import sys
from pathlib import Path

import torch

from mp2.backbone import load_backbone, save_backbone

work = Path(sys.argv[1])
save_backbone(load_backbone(work / "steer" / "backbone"), work / "mini", dtype=torch.float16)
PY

# 5. modular prompts and routers over the frozen backbone
mp2 pretrain --backbone "$work/mini" --init "$work/steer/prompts.safetensors" --data "$data" \
  --tasks "${tasks[@]}" --rotated --out "$work/deep" "${shape[@]}" --steps "$(steps 1200)" --warmup-steps 50 \
  --router-lr 0.05 --prompt-lr 5e-3 --dev-limit 100
mp2 pretrain --shallow --backbone "$work/mini" --data "$data" --tasks "${tasks[@]}" --out "$work/shallow" \
  "${shape[@]}" --steps "$(steps 1600)" --warmup-steps 50 --router-lr 0.05 --prompt-lr 5e-3 --temperature-end 0.1 \
  --dev-limit 100

# 6. prompts stored as float16; copy $work/mini to mp2/backbone/mini and $work/prompts to mp2/prompts/mini
python - "$work" <<'PY'
import sys
from pathlib import Path

import torch

from mp2.prompts import load_prompts, save_prompts

work = Path(sys.argv[1])
for kind in ("deep", "shallow"):
    prompts = load_prompts(work / kind / "prompts.safetensors")
    save_prompts(prompts, work / "prompts" / f"{kind}.safetensors", dtype=torch.float16)
PY
