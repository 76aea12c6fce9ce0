#!/usr/bin/env bash
# Prefill and decode speed on the CPU: everything, latents, streaming heads, few bits and fp8 against
# transformers' generate. Writes benchmarks/results/decode*.json.
#
#   benchmarks/decode.sh             # about 20 minutes on two idle cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvtool=${KVTOOL:-.venv/bin/kvtool}
half=.cache/bench/smollm2-half
mkdir -p .cache/bench benchmarks/results
"$kvtool" convert smollm2 --to mla -o "$half" --kv-budget 50% --method transmla --no-verify --overwrite --quiet
"$kvtool" bench "$half" --against smollm2 --dense --context 512,4096,8000 --new-tokens 24 \
  --repeats 1 --json > benchmarks/results/decode.json
"$kvtool" calibrate retrieval-heads smollm2 -o .cache/bench/heads.plan --overwrite
"$kvtool" bench smollm2 --plan .cache/bench/heads.plan --dense --context 512,4096,8160 --new-tokens 24 \
  --repeats 1 --json > benchmarks/results/decode_streaming.json
"$kvtool" calibrate quantization smollm2 --bits auto --kv-budget 28% -o .cache/bench/bits.plan --overwrite
"$kvtool" calibrate quantization smollm2 --bits fp8 -o .cache/bench/fp8.plan --overwrite
for plan in bits fp8; do
  "$kvtool" bench smollm2 --plan ".cache/bench/$plan.plan" --dense --context 512,4096,8000 --new-tokens 24 \
    --repeats 1 --json > "benchmarks/results/decode_$plan.json"
done
