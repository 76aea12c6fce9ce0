#!/usr/bin/env bash
# Prefill and decode speed on the CPU: our dense and latent stores against transformers' generate.
# Writes benchmarks/results/decode/*.json.
#
#   benchmarks/decode.sh             # about 20 minutes on two idle cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvtool=${KVTOOL:-.venv/bin/kvtool}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
results=benchmarks/results/decode
mkdir -p "$results"

"$kvtool" bench smollm2 --context 512,4096,8000 --new-tokens 24 --repeats 3 --json \
  > "$results/dense.json"
"$kvtool" convert smollm2 --to mla -o "$work/half" --kv-budget 50% --no-verify --quiet
"$kvtool" bench "$work/half" --against smollm2 --dense --context 512,4096,8000 --new-tokens 24 \
  --repeats 3 --json > "$results/latent-50.json"
