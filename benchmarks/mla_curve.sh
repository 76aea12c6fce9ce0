#!/usr/bin/env bash
# The quality of MLA conversions of smollm2 at several cache sizes, by the protocol of
# `kvtool evaluate`. Writes benchmarks/results/mla_curve/*.json and prints one line each.
#
#   benchmarks/mla_curve.sh          # about 20 minutes on two cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvtool=${KVTOOL:-.venv/bin/kvtool}
work=.cache/bench
results=benchmarks/results/mla_curve
mkdir -p "$results" "$work"

measure() { # name, options
  "$kvtool" convert smollm2 --to mla -o "$work/$1" --no-verify --overwrite --json "${@:2}" \
    > "$results/$1.convert.json"
  "$kvtool" evaluate "$work/$1" --against smollm2 --no-speed -o "$results/$1.json"
  rm -rf "${work:?}/$1"
}
measure exact --method exact
for budget in 75 50 37.5; do
  measure "transmla-$budget" --kv-budget "$budget%"
done
