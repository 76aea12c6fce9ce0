#!/bin/sh
# A CI job: calibrate a plan for MODEL and fail unless the compressed cache still recalls.
#
#   recipes/ci/streaming-heads.sh MODEL OUTPUT_FOLDER
#
# Exit codes are kvtool's: 0 good, 6 a quality gate failed, 5 out of memory or disk, ... Results are
# JSON on stdout of each command; stderr stays empty unless something is wrong.
set -eu

model=${1:?usage: streaming-heads.sh MODEL OUTPUT_FOLDER}
out=${2:?usage: streaming-heads.sh MODEL OUTPUT_FOLDER}
kvtool=${KVTOOL:-kvtool}
mkdir -p "$out"

"$kvtool" calibrate statistics "$model" ${STATISTICS_OPTIONS:-} --json > "$out/statistics.json"
"$kvtool" calibrate retrieval-heads "$model" -o "$out/heads.plan" --overwrite \
    --streaming-heads "${STREAMING_HEADS:-50%}" ${HEADS_OPTIONS:-} --json > "$out/heads.json"
"$kvtool" evaluate "$model" --plan "$out/heads.plan" --quick --no-speed ${EVALUATE_OPTIONS:-} \
    --max-ppl-ratio "${MAX_PPL_RATIO:-1.05}" --min-recall "${MIN_RECALL:-0.95}" \
    --output "$out/report.json" --json > /dev/null
