#!/usr/bin/env bash
# Trains every run behind docs/RESULTS.md and keeps its small data.
#   make results        (or: bash scripts/results.sh [--only NAME]... [FOLDER], with NAME a grid below or its beginning, such as digits)
# A second call continues where the first stopped. `--collect` only copies the data and writes the tables.
set -euo pipefail
cd "$(dirname "$0")/.."
collect='' only='' out=''
while [ $# -gt 0 ]; do
  case $1 in
    --collect) collect=yes ;;
    --only) only="$only $2"; shift ;;
    *) out=$1 ;;
  esac
  shift
done
out=${out:-runs/results}
python=${PYTHON:-python}
common=(--eval_steps 50 --eval_samples 500 --logger none --save_images_epochs 0)
crops=(--bundled_data photo_crops --resolution 32 --train_batch_size 64 --max_train_steps 400 --eval_steps 100 --eval_samples 300
       --eval_batch_size 50 --logger none --save_images_epochs 0)
flow=(--noise_process flow --prediction_type flow_prediction --eval_inference_steps 2 5 20)
quiet=(--logger none --save_images_epochs 0)
held=(--logger none --save_images_epochs 0 --validation_split 0.3 --eval_samples 1000)
all=(--eval_inference_steps 2 5 20 100)

grid() { # name, core-minutes, task, seeds, methods, flags of every run
  local name=$1 minutes=$2 task=$3 seeds=$4 methods=$5
  shift 5
  local wanted=${only:+no} one
  for one in $only; do [[ $name == "$one"* ]] && wanted=yes; done
  [ "$wanted" = no ] && return
  if [ "$pass" = count ]; then
    total=$((total + minutes))
    return
  fi
  if [ -z "$collect" ]; then
    if [[ $task == emoji* ]] && [ ! -d runs/emoji16/train ]; then "$python" scripts/make_emoji.py runs/emoji16 --side 16; fi
    if [[ $task == sd_tiny ]]; then
      [ -d runs/tiny_sd/classes ] || "$python" scripts/make_tiny_sd.py runs/tiny_sd
      [ -d runs/demo-sd/captions ] || "$python" scripts/precompute_latents.py --config configs/tasks/sd_tiny.yaml
    fi
    # shellcheck disable=SC2086
    "$python" scripts/compare.py ${script:+--script "$script"} --task $task --methods $methods --seeds $seeds --jobs 2 --output_dir "$out/$name" -- "$@"
  fi
  local kept=docs/results/$name first=${methods%% *} measure
  for run in "$out/$name"/*-seed*; do
    [ -f "$run/summary.json" ] || continue
    mkdir -p "$kept"
    cp "$run/evaluation.jsonl" "$kept/$(basename "$run").jsonl"
  done
  [ -d "$kept" ] || return 0
  if [ -f "$out/$name/report.md" ]; then sed -E '/^## /,$!d; s#[^ ]*/(runs/results/)#\1#g' "$out/$name/report.md" > "$kept/report.md"; fi
  : > "$kept/distances.md"
  for measure in frechet_distance frechet_distance_held_out nearest_neighbor_ratio kid precision recall density coverage \
    per_class_frechet_distance within_class_distance alignment uniformity; do
    grep -qs "\"$measure\"" "$kept"/*-seed*.jsonl || continue
    { "$python" scripts/distances.py "$kept" --baseline "${first%%=*}" --measure "$measure"; echo; } >> "$kept/distances.md"
  done
}

grids() {
  # Digits and photo crops, unconditional.
  grid digits_v 36 "digits" "0 1 2" "baseline immiscible speed immiscible_speed scaled scaled+immiscible speed_sampling immiscible+speed_sampling scaled+immiscible+speed_sampling" "${common[@]}"
  grid digits_fresh 12 "digits" "3 4 5" "baseline immiscible immiscible_speed_sampling" "${common[@]}"
  grid digits_window 16 "digits" "0 1 2" "baseline window window+speed_sampling scaled+window+speed_sampling" "${common[@]}"
  grid digits_window_fresh 12 "digits" "3 4 5" "baseline window window+speed_sampling" "${common[@]}"
  grid digits_epsilon 12 "digits" "0 1 2" "baseline immiscible speed" "${common[@]}" --prediction_type epsilon
  grid digits_sample 8 "digits" "0 1 2" "baseline immiscible" "${common[@]}" --prediction_type sample
  grid digits_flow 8 "digits" "0 1 2" "baseline immiscible" "${common[@]}" "${flow[@]}"
  grid digits_v_snr 8 "digits" "0 1 2" "snr immiscible+snr" "${common[@]}"
  grid crops_v 20 "digits" "0 1 2" "baseline immiscible immiscible_speed_sampling" "${crops[@]}"
  grid crops_epsilon 13 "digits" "0 1 2" "baseline immiscible" "${crops[@]}" --prediction_type epsilon
  grid crops_sample 13 "digits" "0 1 2" "baseline immiscible" "${crops[@]}" --prediction_type sample
  grid crops_flow 13 "digits" "0 1 2" "baseline immiscible" "${crops[@]}" "${flow[@]}"

  # Couplings over epochs and classes, with guidance. Samples are also held against images held out.
  grid digits_epoch 27 "digits" "0 1 2" "baseline immiscible window epoch immiscible_knn reservoir flipped" "${held[@]}" "${all[@]}" --eval_steps 400
  grid digits_classes 150 "digits classes" "0 1 2" "baseline immiscible immiscible_within window window+immiscible_within epoch epoch_within immiscible_knn reservoir flipped" "${held[@]}" "${all[@]}" --max_train_steps 600 --eval_steps 600 --eval_guidance_scales 1 1.5 2 3
  grid digits_classes_fresh 30 "digits classes" "3 4 5 6 7" "baseline immiscible epoch epoch_within" "${held[@]}" --max_train_steps 600 --eval_steps 600 --eval_guidance_scales 1 1.5
  grid digits_epsilon_weighted 46 "digits" "0 1 2" "epsilon epsilon+immiscible epsilon+velocity epsilon+velocity+immiscible epsilon+velocity+epoch epsilon+min_snr epsilon+min_snr+immiscible" "${held[@]}" "${all[@]}" --eval_steps 200
  grid crops_epoch 48 "digits" "0 1 2" "baseline immiscible window epoch" "${crops[@]}" --eval_inference_steps 2 5 20
  grid emoji 160 "emoji" "0 1 2" "baseline immiscible window epoch immiscible_knn reservoir flipped" "${quiet[@]}" "${all[@]}" --eval_steps 3000
  grid emoji_classes 320 "emoji classes" "0 1 2" "baseline immiscible immiscible_within window epoch epoch_within immiscible_knn reservoir flipped" "${quiet[@]}" "${all[@]}" --eval_steps 3000 --eval_guidance_scales 1 1.5 3
  grid emoji_classes_fresh 110 "emoji classes" "3 4 5 6 7" "baseline epoch epoch_within" "${quiet[@]}" --eval_steps 3000
  # Latents of a VAE that was trained briefly, with captions.
  script=train_text_to_image.py grid latents 18 "sd_tiny" "0 1 2" "baseline immiscible epoch" --prediction_type v_prediction --eval_inference_steps 5 20 --eval_guidance_scales 1 3 --proportion_empty_prompts 0.1 --eval_steps 80

  # Consistency models in one and two steps, EDM in several.
  grid digits_consistency 40 "digits classes consistency" "0 1 2" "baseline immiscible epoch epoch_within speed_sampling" "${held[@]}" --max_train_steps 600 --eval_steps 100 --eval_samples 500
  grid digits_consistency_unconditional 26 "digits consistency" "0 1 2" "baseline immiscible epoch" "${held[@]}" --max_train_steps 600 --eval_steps 100 --eval_samples 500
  grid digits_consistency_1281 16 "digits consistency" "0 1 2" "baseline immiscible" "${held[@]}" --max_train_steps 600 --eval_steps 100 --eval_samples 500 --discretization_s_1 1280
  grid digits_consistency_batch_16 12 "digits consistency" "0 1 2" "baseline immiscible" "${held[@]}" --max_train_steps 600 --eval_steps 100 --eval_samples 500 --train_batch_size 16
  grid digits_consistency_batch_256 40 "digits consistency" "0 1 2" "baseline immiscible" "${held[@]}" --max_train_steps 600 --eval_steps 100 --eval_samples 500 --train_batch_size 256
  grid digits_consistency_late 8 "digits consistency" "0 1 2" "baseline immiscible" "${held[@]}" --max_train_steps 600 --eval_steps 100 --eval_samples 500 --coupling_start_step 300
  grid digits_consistency_original 16 "digits consistency" "0 1 2" "baseline immiscible" "${held[@]}" --max_train_steps 600 --eval_steps 100 --eval_samples 500 --discretization square_root --discretization_s_0 2 --level_sampling uniform --level_weighting none --consistency_distance l2 --teacher ema
  grid digits_edm 30 "digits classes edm" "0 1 2" "baseline immiscible epoch epoch_within speed" "${held[@]}" --eval_steps 200
  grid emoji_consistency 120 "emoji classes consistency" "0 1 2" "baseline immiscible epoch epoch_within speed_sampling" "${quiet[@]}" --max_train_steps 1500 --eval_steps 500
  grid emoji_edm 80 "emoji classes edm" "0 1 2" "baseline immiscible epoch epoch_within speed" "${quiet[@]}" --max_train_steps 1000 --eval_steps 1000
  grid crops_consistency 60 "digits consistency" "0 1 2" "baseline immiscible epoch speed_sampling" "${crops[@]}" --eval_inference_steps 1 2

  # Every law and every weighting, beside SpeeD, in a U-Net and in a DiT that are told classes.
  laws="baseline speed_sampling two_phase logit_normal edm_log_normal mode laplace beta clts loss_second_moment speed_weighting speed p2 min_snr soft_min_snr debiased edm_weighting cosmap velocity snr"
  phases=(--clts_ramp_steps 300 --clts_std 0.2 --second_phase_step 300)
  grid digits_laws 120 "digits classes" "0 1 2" "$laws" "${held[@]}" "${phases[@]}" --max_train_steps 600 --eval_steps 600 --eval_guidance_scales 0.75 1 1.5 2 3
  grid digits_laws_dit 150 "digits classes dit_tiny" "0 1 2" "$laws" "${held[@]}" "${phases[@]}" --max_train_steps 600 --eval_steps 600 --eval_guidance_scales 0.75 1 1.5 2 3
  grid emoji_laws 150 "emoji classes" "0 1 2" "$laws" "${quiet[@]}" "${phases[@]}" --max_train_steps 600 --eval_steps 600 --eval_guidance_scales 1 1.5
  grid emoji_laws_dit 200 "emoji classes dit_tiny" "0 1 2" "$laws" "${quiet[@]}" "${phases[@]}" --max_train_steps 600 --eval_steps 600 --eval_guidance_scales 1 1.5

  # Quality by every metric, by class too, of the arms of the headline.
  metrics=(--eval_metrics frechet_distance kid precision recall density coverage per_class_frechet_distance within_class_distance alignment uniformity)
  grid digits_scores 25 "digits classes" "0 1 2" "baseline immiscible immiscible_within epoch_within" "${held[@]}" "${metrics[@]}" --max_train_steps 600 --eval_steps 600
  grid emoji_scores 130 "emoji classes" "0 1 2" "baseline epoch epoch_within" "${quiet[@]}" "${metrics[@]}" --eval_steps 3000

  # Optimizers beside the coupling, in a DiT.
  muon=configs/optimizers/muon.yaml prodigy=configs/optimizers/prodigy.yaml free=configs/optimizers/schedule_free.yaml
  grid digits_optimizers 60 "digits dit_tiny" "0 1 2" "baseline epoch muon=$muon epoch_muon=epoch+$muon prodigy=$prodigy epoch_prodigy=epoch+$prodigy schedule_free=$free epoch_schedule_free=epoch+$free" "${common[@]}" --eval_steps 400

  # The stack: chosen on three seeds, confirmed on others, with curves.
  grid digits_stack 75 "digits classes" "0 1 2" "epsilon baseline epoch_within epoch_within+speed_sampling epoch_within+scaled epoch_within+logit_normal epoch_within+min_snr epoch_within+sample epoch_within+sample+speed_sampling epoch_within+flow" "${held[@]}" --max_train_steps 600 --eval_steps 60
  grid digits_stack_fresh 60 "digits classes" "10 11 12" "epsilon baseline flow epoch_within+flow" "${quiet[@]}" --validation_split 0.3 --eval_samples 500 --max_train_steps 1200 --eval_steps 60
  grid emoji_stack 120 "emoji classes" "10 11 12" "epsilon baseline flow epoch+flow" "${quiet[@]}" --eval_steps 300
}

total=0 pass=count
grids
if [ "$total" = 0 ]; then echo "--only$only: no grid begins so; this file names them" >&2; exit 2; fi
pass=train
[ -n "$collect" ] || echo "about $total core-minutes in all, $(((total + 119) / 120)) hours on two cores, less what is finished (an estimate)"
grids
