#!/usr/bin/env bash
# Other people's clients against `kvtool serve-local`: curl, lm-eval's local-completions on a task of
# its own, and `transformers chat`. lm-eval and aiohttp are in the environment that LM_EVAL is of.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
TRANSFORMERS=${TRANSFORMERS:-$(dirname "$PYTHON")/transformers}
LM_EVAL=${LM_EVAL:-.venv/bin/lm-eval}
PORT=${PORT:-8765}
URL=http://127.0.0.1:$PORT
WORK=$(mktemp -d)
export HF_HUB_OFFLINE=1

MODEL=$("$PYTHON" -c 'from kvtool.checkpoint import Checkpoint; print(Checkpoint.open("smollm2").path)')
"$PYTHON" -m kvtool serve-local "$MODEL" --port "$PORT" --kv-memory 512MiB &
SERVER=$!
trap 'kill $SERVER; wait $SERVER || true; rm -rf "$WORK"' EXIT
until curl -sf "$URL/ready" > /dev/null; do
  kill -0 $SERVER
  sleep 1
done

echo "== curl -N"
curl -sN "$URL/v1/chat/completions" -H 'Content-Type: application/json' -d '{"temperature": 0,
  "messages": [{"role": "user", "content": "What is the capital of France?"}], "stream": true}' \
  | tail -n 4

echo "== lm-eval, local-completions"
cat > "$WORK/facts.yaml" << 'YAML'
task: facts
dataset_path: json
dataset_kwargs:
  data_files: {test: WORK/facts.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
YAML
sed -i "s|WORK|$WORK|" "$WORK/facts.yaml"
cat > "$WORK/facts.jsonl" << 'JSON'
{"question": "The capital of France is", "choices": [" Paris", " Berlin", " a fish"], "answer": 0}
{"question": "The opposite of hot is", "choices": [" cold", " seven", " Monday"], "answer": 0}
{"question": "Two plus two is", "choices": [" nine", " four", " blue"], "answer": 1}
{"question": "The sun rises in the", "choices": [" west", " bottle", " east"], "answer": 2}
JSON
"$LM_EVAL" run --model local-completions --tasks facts --include_path "$WORK" --model_args \
  "model=$MODEL,base_url=$URL/v1/completions,tokenizer=$MODEL,num_concurrent=2,max_retries=1" \
  | grep facts

echo "== transformers chat" # its client speaks to no server at all while it is offline
printf 'What is the capital of France?\n!exit\n' \
  | env -u HF_HUB_OFFLINE "$TRANSFORMERS" chat "$MODEL" "$URL/v1" max_new_tokens=16 do_sample=False
