#!/usr/bin/env bash
# Retrieval heads of smollm2 by every method, and random ones, at three shares of streaming heads.
# Writes benchmarks/results/heads.json and prints how the methods' scores correlate.
#
#   benchmarks/heads.sh              # about 40 minutes on two idle cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kvtool=${KVTOOL:-.venv/bin/kvtool}
python=${PYTHON:-.venv/bin/python}
plans=.cache/bench/heads
mkdir -p "$plans" benchmarks/results
for method in ablation duo attention semantic entropy; do
  "$kvtool" calibrate retrieval-heads smollm2 -o "$plans/$method.plan" --method "$method" --overwrite
done
"$kvtool" calibrate compare-heads "$plans"/*.plan
"$python" benchmarks/heads.py smollm2 "$plans"/{ablation,duo,attention,semantic,entropy}.plan \
  -o benchmarks/results/heads.json
