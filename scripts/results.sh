#!/usr/bin/env bash
# Trains every run behind docs/RESULTS.md and keeps its small data: about 90 runs, an hour on two CPU cores.
#   make results        (or: bash scripts/results.sh [FOLDER])
# A second call continues where the first stopped. `--collect` only copies the data and writes the tables.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" = --collect ] && collect=yes && shift
out=${1:-runs/results}
python=${PYTHON:-python}
common=(--eval_steps 50 --eval_samples 500 --logger none --save_images_epochs 0)
crops=(--bundled_data photo_crops --resolution 32 --train_batch_size 64 --max_train_steps 400 --eval_steps 100 --eval_samples 300
       --eval_batch_size 50 --logger none --save_images_epochs 0)
flow=(--noise_process flow --prediction_type flow_prediction --eval_inference_steps 2 5 20)

grid() { # name, seeds, methods, flags of every run
  local name=$1 seeds=$2 methods=$3
  shift 3
  if [ -z "${collect:-}" ]; then
    # shellcheck disable=SC2086
    "$python" scripts/compare.py --task digits --methods $methods --seeds $seeds --jobs 2 --output_dir "$out/$name" -- "$@"
  fi
  for run in "$out/$name"/*-seed*; do
    mkdir -p "docs/results/$name"
    cp "$run/evaluation.jsonl" "docs/results/$name/$(basename "$run").jsonl"
  done
  sed '/^## /,$!d' "$out/$name/report.md" > "docs/results/$name/report.md"
}

grid digits_v "0 1 2" "baseline immiscible speed immiscible_speed scaled scaled+immiscible speed_sampling immiscible+speed_sampling scaled+immiscible+speed_sampling" "${common[@]}"
grid digits_fresh "3 4 5" "baseline immiscible immiscible_speed_sampling" "${common[@]}"
grid digits_window "0 1 2" "baseline window window+speed_sampling scaled+window+speed_sampling" "${common[@]}"
grid digits_window_fresh "3 4 5" "baseline window window+speed_sampling" "${common[@]}"
grid digits_epsilon "0 1 2" "baseline immiscible speed" "${common[@]}" --prediction_type epsilon
grid digits_sample "0 1 2" "baseline immiscible" "${common[@]}" --prediction_type sample
grid digits_flow "0 1 2" "baseline immiscible" "${common[@]}" "${flow[@]}"
grid digits_v_snr "0 1 2" "snr immiscible+snr" "${common[@]}"
grid crops_v "0 1 2" "baseline immiscible immiscible_speed_sampling" "${crops[@]}"
grid crops_epsilon "0 1 2" "baseline immiscible" "${crops[@]}" --prediction_type epsilon
grid crops_sample "0 1 2" "baseline immiscible" "${crops[@]}" --prediction_type sample
grid crops_flow "0 1 2" "baseline immiscible" "${crops[@]}" "${flow[@]}"
