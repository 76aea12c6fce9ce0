#!/usr/bin/env bash
# Prefill and decode speed on the CPU: our latent and dense stores against transformers' generate.
# Writes benchmarks/results/decode.json.
#
#   benchmarks/decode.sh             # about 5 minutes on two idle cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvtool=${KVTOOL:-.venv/bin/kvtool}
half=.cache/bench/smollm2-half
mkdir -p .cache/bench benchmarks/results
"$kvtool" convert smollm2 --to mla -o "$half" --kv-budget 50% --method transmla --no-verify --overwrite --quiet
"$kvtool" bench "$half" --against smollm2 --dense --context 512,4096,8000 --new-tokens 24 \
  --repeats 1 --json > benchmarks/results/decode.json
