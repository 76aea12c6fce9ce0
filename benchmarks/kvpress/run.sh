#!/usr/bin/env bash
# Measures the methods of kvpress on the very token ids that kvtool is measured on, and prints one
# table with whatever else lies in results/kvpress/ (kvtool's own rows, in the same format).
# kvpress needs an older transformers, hence an environment of its own (about 1.4 GB).
#
#   benchmarks/kvpress/run.sh [VENV]     # default .cache/kvpress/venv
#   KVPRESS_PYTHON=/path/to/python benchmarks/kvpress/run.sh   # a kvpress that is installed already
#   KVTOOL_PYTHON=/path/to/python        # default .venv/bin/python
#   CASES="--windows 1 --passkey-lengths 1024"   # less to read; see cases.py
#   METHODS="SnapKV TOVA"                # only some methods
#   RESULTS=/path/to/folder              # default benchmarks/results/kvpress
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=benchmarks/kvpress
work=.cache/kvpress
results=${RESULTS:-benchmarks/results/kvpress}
mkdir -p "$work" "$results"
python=${KVTOOL_PYTHON:-.venv/bin/python}
venv=${1:-$work/venv}
kvpress=${KVPRESS_PYTHON:-$venv/bin/python}
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD

if [ -z "${KVPRESS_PYTHON:-}" ] && [ ! -f "$venv/ready" ]; then
  "$python" -m venv "$venv"
  "$venv/bin/pip" install -q torch==2.13.0
  "$venv/bin/pip" install -q torch==2.13.0 kvpress==0.5.5 transformers==5.2.0
  touch "$venv/ready"
fi

# CASES and METHODS are lists of words, so they are not quoted.
"$python" "$here/cases.py" write "$work/cases.json" ${CASES:-}
"$kvpress" "$here/press.py" "$work/cases.json" "$work/answers.json" ${METHODS:-}
"$python" "$here/cases.py" score "$work/cases.json" "$work/answers.json" > "$work/results.json"
mv "$work/results.json" "$results/kvpress.json"
"$python" "$here/cases.py" table "$results"/*.json
