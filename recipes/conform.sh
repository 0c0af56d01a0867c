#!/usr/bin/env bash
# The paper's Tables 3 and 5 and Figures 3, 4a, 4b and 5 over any backbone, with as many cells as the time allows, the most telling first.
#   recipes/conform.sh BACKBONE PROMPTS_DIR DOWNSTREAM_DIR OUT_DIR MINUTES [OPTION ...]
# PROMPTS_DIR: what recipes/prompts.sh made, in whole or in part (deep, shallow, spot, ppt, head, deep-one-rate, shallow-two-rates); what is
# not there is left out. DOWNSTREAM_DIR: <task>/{train,test}.jsonl. OUT_DIR gets a JSON, a page (.md) and a picture a table or figure; each
# page says at what scale its cells were run and which are missing. OPTIONs of all: --iters, --epochs, --jobs, --max-tokens ...
# SEEDS in the environment: others than the paper's 8,13,21,42,100.
# Started again with the same OPTIONs it goes on with what is missing. A cell that has begun is finished: the end may be one cell late.
# A cell or a table that fails does not stop the others; the exit status is then 1.
set -uo pipefail
if [ $# -lt 5 ]; then
  echo "conform.sh: $# words, expected BACKBONE PROMPTS_DIR DOWNSTREAM_DIR OUT_DIR MINUTES" >&2
  exit 2
fi
backbone=$1 prompts=$2 data=$3 out=$4 minutes=$5
options=(--iters 220 --epochs 50 --test-limit 200 "${@:6}")
begun=$(date +%s) status=0
mkdir -p "$out" || exit

# the prompt files NAME ... that are there: float16 where the recipe came to its end
files() {
  local name file
  for name in "$@"; do
    for file in "$prompts/float16/$name.safetensors" "$prompts/$name/prompts.safetensors"; do
      if [ -f "$file" ]; then
        echo "$file"
        break
      fi
    done
  done
}

# NAME SHARE PROMPTS [OPTION ...]: a table or figure, until SHARE per cent of the minutes are over
paper() {
  local name=$1 share=$2 found left
  mapfile -t found < <(files $3)
  if [ ${#found[@]} = 0 ]; then
    echo "== $name: none of its prompts ($3) is in $prompts" >&2
    return
  fi
  left=$(python -c "print(f'{max(0.01, $minutes * $share / 100 - ($(date +%s) - $begun) / 60):.2f}')")
  echo "== $name: $left minutes" >&2
  if ! python -m benchmarks.paper "$name" --data "$data" --backbone "$backbone" --prompts "${found[@]}" "${options[@]}" \
    --work "$out/cells/$name" --out "$out/$name.json" --budget-minutes "$left" "${@:4}" > "$out/$name.md.new"; then
    status=1
  fi
  if [ -s "$out/$name.md.new" ]; then mv "$out/$name.md.new" "$out/$name.md"; else rm -f "$out/$name.md.new"; fi
}

every="deep shallow spot ppt head"
seeds=${SEEDS:-8,13,21,42,100}
first=${seeds%%,*}

# 1. the claim, on all tasks: deep MP2, BBTv2 as published, and what needs no tuning
paper table3 30 "$every" --seeds $first --methods majority simple
paper table3 30 "$every" --seeds $first --methods deep bbtv2
# 2. the groups that routers make: seconds
mapfile -t both < <(files shallow deep)
[ ${#both[@]} = 0 ] || python -m benchmarks.paper figure5 --prompts "${both[@]}" --out "$out" > "$out/figure5.md" || status=1
# 3. the other methods, one seed
paper table3 60 "$every" --seeds $first
# 4. the figures and the ablation, one seed
paper figure3 66 shallow --seeds $first
paper table5 72 "deep deep-one-rate shallow shallow-two-rates" --seeds $first
paper figure4b 78 "deep shallow ppt" --seeds $first
if [ -d "$data/iflytek" ]; then paper figure4a 84 "deep shallow ppt" --seeds $first; fi
# 5. more seeds, the claim before the rest; the last pages name what is missing of everything
[ "$seeds" != "$first" ] || exit $status
paper table3 92 "$every" --seeds $seeds --methods majority simple deep bbtv2
paper table3 100 "$every" --seeds $seeds
paper figure3 100 shallow --seeds $seeds
paper table5 100 "deep deep-one-rate shallow shallow-two-rates" --seeds $seeds
paper figure4b 100 "deep shallow ppt" --seeds $seeds
if [ -d "$data/iflytek" ]; then paper figure4a 100 "deep shallow ppt" --seeds $seeds; fi
exit $status
