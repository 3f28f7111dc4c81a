#!/usr/bin/env bash
# DreamBooth with BOFT on one subject.
#
#   ./train_dreambooth.sh                    an embedded subject on the embedded base: minutes on a laptop's CPU
#   SUBJECT=NAME ./train_dreambooth.sh       another one of data/toyworld/subjects
#   ./train_dreambooth.sh 27                 subject 0 … 29 of google/dreambooth, in alphabetical order (27 = teapot)
#   MODEL_NAME=stable-diffusion-v1-5/stable-diffusion-v1-5 ./train_dreambooth.sh 27      the same on a GPU
#
# Every variable below can be set from outside, prompts to one or to a .txt file with one a line; further flags go after
# the index: ./train_dreambooth.sh 27 --seed=1
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

IDX=""
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
  IDX="$1"
  shift
fi

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$(command -v python3 || command -v python)"
  [[ -x "$HERE/.venv/bin/python" ]] && PYTHON="$HERE/.venv/bin/python"
fi
EMBEDDED="$HERE/data/toyworld"
MODEL_NAME="${MODEL_NAME:-$EMBEDDED/base}"
UNIQUE_TOKEN="${UNIQUE_TOKEN:-qwe}"

# The subject: its photos, its prompts, the prompts of its class. scripts/prepare_dataset.py prints one line each.
if [[ -z "$IDX" ]]; then
  FOUND="$("$PYTHON" "$HERE/scripts/prepare_dataset.py" embedded "${SUBJECT:-}")"
else
  FOUND="$("$PYTHON" "$HERE/scripts/prepare_dataset.py" dreambooth "$IDX" --token="$UNIQUE_TOKEN")"
fi
NAME="" INSTANCE_PROMPT_FOUND="" INSTANCE_DIR_FOUND=""
CLASS_PROMPTS=() VALIDATION_PROMPTS=() BASE_PROMPTS=()
while IFS=$'\t' read -r key value; do
  case "$key" in
    name) NAME="$value" ;;
    instance_dir) INSTANCE_DIR_FOUND="$value" ;;
    instance_prompt) INSTANCE_PROMPT_FOUND="$value" ;;
    class_prompt) CLASS_PROMPTS+=("$value") ;;
    validation_prompt) VALIDATION_PROMPTS+=("$value") ;;
    base_prompt) BASE_PROMPTS+=("$value") ;;
  esac
done <<< "$FOUND"
[[ -n "${CLASS_PROMPT:-}" ]] && CLASS_PROMPTS=("$CLASS_PROMPT")
[[ -n "${VALIDATION_PROMPT:-}" ]] && VALIDATION_PROMPTS=("$VALIDATION_PROMPT") BASE_PROMPTS=()
INSTANCE_DIR="${INSTANCE_DIR:-$INSTANCE_DIR_FOUND}"
INSTANCE_PROMPT="${INSTANCE_PROMPT:-$INSTANCE_PROMPT_FOUND}"
CLASS_DIR="${CLASS_DIR:-$HERE/data/class_images/$(basename "$MODEL_NAME")/$NAME}"
OUTPUT_DIR="${OUTPUT_DIR:-$HERE/data/output/dreambooth${IDX:+/$NAME}}"
PROJECT_NAME="${PROJECT_NAME:-dreambooth}"
RUN_NAME="${RUN_NAME:-$NAME}"
REPORT_TO="${REPORT_TO:-$([[ -n "$IDX" ]] && echo wandb || echo tensorboard)}" # wandb: offline where there is no key

if [[ "$MODEL_NAME" -ef "$EMBEDDED/base" ]]; then
  # 64 pixels on a CPU. Blocks of 8 in 2 butterfly factors on attention, feed-forward and convolutions: details are drawn
  # where this UNet has no attention. The scale learns at a tenth of the rotations' rate: at theirs, prompts lose control.
  SETTINGS=(
    --train_batch_size=6 --max_train_steps="${STEPS:-200}"
    --boft_block_size="${BLOCK_SIZE:-8}" --boft_n_butterfly_factor="${FACTORS:-2}"
    --boft_target_modules all --boft_scale_learning_rate="${SCALE_RATE:-4e-4}"
    --learning_rate="${LEARNING_RATE:-4e-3}" --lr_scheduler=polynomial --lr_warmup_steps=20
    --adam_weight_decay=0 --num_class_images="${NUM_CLASS_IMAGES:-64}" --sample_batch_size=16
    --guidance_scale=3 --num_inference_steps=25 --validation_steps=100 --checkpointing_steps=100 --center_crop
  )
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')}"
else
  # The papers' recipe (512 pixels, a GPU), with a real butterfly: 8 blocks a layer, 2 factors.
  SETTINGS=(
    --resolution="${RESOLUTION:-512}" --train_batch_size=1 --num_dataloader_workers=2 --max_train_steps="${STEPS:-1010}"
    --boft_block_num="${BLOCK_NUM:-8}" --boft_block_size=0 --boft_n_butterfly_factor="${FACTORS:-2}"
    --boft_dropout=0.1 --boft_bias=boft_only
    --learning_rate="${LEARNING_RATE:-3e-5}" --lr_scheduler=constant --lr_warmup_steps=0
    --num_class_images="${NUM_CLASS_IMAGES:-200}" --validation_steps=200 --checkpointing_steps=200
  )
  if "$PYTHON" -c 'import torch, xformers; assert torch.cuda.is_available()' 2> /dev/null; then
    SETTINGS+=(--enable_xformers_memory_efficient_attention)
  fi
fi

# Several GPUs, or a machine with an accelerate configuration: accelerate starts the processes.
LAUNCH=("$PYTHON")
if [[ -n "${ACCELERATE:-}" || -f "${HF_HOME:-$HOME/.cache/huggingface}/accelerate/default_config.yaml" ]]; then
  LAUNCH=("$PYTHON" -m accelerate.commands.launch ${ACCELERATE:-})
fi

exec "${LAUNCH[@]}" "$HERE/train_dreambooth.py" \
  --pretrained_model_name_or_path="$MODEL_NAME" \
  --instance_data_dir="$INSTANCE_DIR" \
  --instance_prompt="$INSTANCE_PROMPT" \
  --with_prior_preservation --prior_loss_weight=1.0 \
  --class_data_dir="$CLASS_DIR" \
  --class_prompt "${CLASS_PROMPTS[@]}" \
  --validation_prompt "${VALIDATION_PROMPTS[@]}" \
  ${BASE_PROMPTS[@]+--base_prompt "${BASE_PROMPTS[@]}"} \
  --output_dir="$OUTPUT_DIR" --overwrite_output_dir \
  --wandb_project_name="$PROJECT_NAME" --wandb_run_name="$RUN_NAME" --report_to="$REPORT_TO" \
  --use_boft \
  "${SETTINGS[@]}" "$@"
