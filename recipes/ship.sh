#!/usr/bin/env bash
# The next embedded backbone, five times as many tokens as mini.sh, with every prompt over it: from plain text to float16 files.
#   recipes/ship.sh CORPUS_DIR UPSTREAM_DIR WORK_DIR [SCALE]
# CORPUS_DIR: *.txt.xz, one paragraph a line, a blank line after each document. UPSTREAM_DIR: <task>/{train,dev}.jsonl. SCALE divides
# all steps (1: 40,000 of the backbone, 328 M tokens; 10,000 of MP2). One CPU core: days; never yet run at 1. Every step resumes: start it again.
# BACKBONE_OPTIONS, PRETRAIN_OPTIONS, MODULAR_OPTIONS, PROMPT_TOKENS and TASKS in the environment: see backbone.sh and prompts.sh.
# The result, WORK_DIR/shipped: backbone/ goes to mp2/backbone/NAME, prompts/ to mp2/prompts/NAME. It may have 25 MB.
set -euo pipefail
here=$(dirname "$0") corpus=$1 upstream=$2 work=$3 scale=${4:-1}
read -ra options <<< "${BACKBONE_OPTIONS:-}"
most_bytes=25000000

# 1. the backbone (stages in backbone.sh)
if [ ! -f "$work/split" ]; then
  "$here/backbone.sh" split "$corpus" "$work"
  touch "$work/split"
fi
"$here/backbone.sh" train "$work" "${options[@]}" --steps $((40000 / scale))
"$here/backbone.sh" lengthen "$work" "${options[@]}"
"$here/backbone.sh" ship "$work" decayed "${options[@]}"

# 2. prompts over it, frozen: a hundredth of the paper's steps, in a shape that fits into a package
export PROMPT_TOKENS=${PROMPT_TOKENS:-32}
export MODULAR_OPTIONS=${MODULAR_OPTIONS---intrinsic-dim 64 --router-normalisation sum}
export PRETRAIN_OPTIONS=${PRETRAIN_OPTIONS---max-tokens 128 --precision bf16 --threads 1 --schedule linear}
"$here/prompts.sh" "$work/decayed-float16" "$upstream" "$work/corpus" "$work/prompts" $((100 * scale))

# 3. what goes into the package
mkdir -p "$work/shipped/prompts"
rm -rf "$work/shipped/backbone"
cp -r "$work/decayed-float16" "$work/shipped/backbone"
cp "$work"/prompts/float16/{deep,shallow}.safetensors "$work/shipped/prompts"
bytes=$(cat "$work"/shipped/*/* | wc -c)
echo "$work/shipped: $bytes bytes"
if [ "$bytes" -gt "$most_bytes" ]; then
  echo "$work/shipped has $bytes bytes, expected at most $most_bytes: take fewer --prompt-tokens or --intrinsic-dim" >&2
  exit 1
fi
