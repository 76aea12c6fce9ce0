#!/usr/bin/env bash
# The quality of MLA conversions of smollm2 at several cache sizes, by the protocol of
# `kvtool evaluate`. Writes benchmarks/results/mla_curve/*.json.
#
#   benchmarks/mla_curve.sh [NAME...]     # all of them, or those named: exact aware-50 healed-50 ...
#
# On two idle cores a fit takes about 2 minutes, an evaluation 5, and the healing of `healed-50` and
# `healed-37.5` 30 and 45.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvtool=${KVTOOL:-.venv/bin/kvtool}
work=.cache/bench
results=benchmarks/results/mla_curve
mkdir -p "$results" "$work"

wanted=" $* "

measure() { # name, options
  [ "$wanted" = "  " ] || [[ "$wanted" == *" $1 "* ]] || return 0
  "$kvtool" convert smollm2 --to mla -o "$work/$1" --no-verify --overwrite --json "${@:2}" \
    > "$results/$1.convert.json"
  "$kvtool" evaluate "$work/$1" --against smollm2 --no-speed -o "$results/$1.json"
  [ ! -e "$work/$1/kvtool/healing.jsonl" ] || cp "$work/$1/kvtool/healing.jsonl" "$results/$1.healing.jsonl"
  rm -rf "${work:?}/$1"
}
measure exact --method exact
for budget in 75 50 37.5; do
  for method in transmla aware; do
    measure "$method-$budget" --method "$method" --kv-budget "$budget%"
  done
  measure "aware-kvtool-$budget" --kv-budget "$budget%" --target kvtool
done
measure healed-50 --kv-budget 50% --target kvtool --heal 300k
measure healed-37.5 --kv-budget 37.5% --target kvtool --heal 400k
