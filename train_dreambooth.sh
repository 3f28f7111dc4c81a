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
  # 64 pixels on a CPU, minutes. docs/results.md compares block sizes, depths, layers and rates of the scale, and says
  # where others are better; b=8 and m=2 are the setting that the others are compared with, no proven optimum.
  SETTINGS=(
    --train_batch_size=6                                # 6 photos and as many class images a step
    --max_train_steps="${STEPS:-200}"                   # minutes on a laptop
    --boft_block_size="${BLOCK_SIZE:-8}"                # b: fits all widths of this UNet
    --boft_n_butterfly_factor="${FACTORS:-2}"           # m: a real butterfly, 16 features are mixed by one rotation
    --boft_target_modules all                           # convolutions too: details arise where no attention is
    --learning_rate="${LEARNING_RATE:-4e-3}"            # of the rotations, chosen on two subjects that are not reported
    --boft_scale_learning_rate="${SCALE_RATE:-4e-4}"    # a tenth: at the rotations' rate, prompts lose control
    --lr_scheduler=polynomial --lr_warmup_steps=20      # up in a tenth of the run, then down to 0 along a line
    --adam_weight_decay=0                               # it would pull the rotation back to the base
    --num_class_images="${NUM_CLASS_IMAGES:-64}"        # the prior; made once and kept
    --sample_batch_size=16                              # pictures at a time
    --guidance_scale=3 --num_inference_steps=25         # as in data/README.md
    --validation_steps=100 --checkpointing_steps=100    # twice in the run
    --center_crop                                       # so that latents of oblong photos, too, are encoded once
  )
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')}"
else
  # The papers' recipe (512 pixels, a GPU), but with a real butterfly.
  SETTINGS=(
    --resolution="${RESOLUTION:-512}"                   # of Stable Diffusion 1.x
    --train_batch_size=1                                # a photo and a class image a step
    --num_dataloader_workers=2                          # they read crops ahead
    --max_train_steps="${STEPS:-1010}"                  # the recipe's, about 200 for each photo
    --boft_block_num="${BLOCK_NUM:-8}"                  # 8 blocks a layer, whatever its width
    --boft_block_size=0                                 # follows from their number
    --boft_n_butterfly_factor="${FACTORS:-2}"           # m: 1 is the recipe's own, a block-diagonal rotation
    --boft_dropout=0.1 --boft_bias=boft_only            # a tenth of the blocks rest; biases of adapted layers learn
    --learning_rate="${LEARNING_RATE:-3e-5}"            # the recipe's
    --lr_scheduler=constant --lr_warmup_steps=0
    --num_class_images="${NUM_CLASS_IMAGES:-200}"       # the recipe's
    --validation_steps=200 --checkpointing_steps=200
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
