#!/usr/bin/env bash
# Does healing from `aware` stay ahead of healing from `transmla`? The same windows and steps from
# both, at 50 % of the bytes. Writes the loss of every step to benchmarks/results/heal_starts/*.jsonl.
#
#   benchmarks/heal_starts.sh [TOKENS]     # default 80k: about 10 minutes each on two idle cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvtool=${KVTOOL:-.venv/bin/kvtool}
work=.cache/bench results=benchmarks/results/heal_starts
mkdir -p "$results" "$work"
for method in aware transmla; do
  "$kvtool" convert smollm2 --to mla -o "$work/start" --method "$method" --kv-budget 50% \
    --heal "${1:-80k}" --no-verify --overwrite --json > "$results/$method.convert.json"
  cp "$work/start/kvtool/healing.jsonl" "$results/$method.jsonl"
  rm -rf "$work/start"
done
paste <(sed 's/.*"loss": \([0-9.]*\).*/\1/' "$results/aware.jsonl") \
  <(sed 's/.*"loss": \([0-9.]*\).*/\1/' "$results/transmla.jsonl") | awk '
  BEGIN { print "step  aware  transmla" } { printf "%4d  %.3f  %.3f\n", NR, $1, $2 }'
