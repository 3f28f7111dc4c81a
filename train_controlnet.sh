#!/usr/bin/env bash
# Light control with BOFT: a hint encoder reads the control image, BOFT adapts the UNet to heed it.
#
#   ./train_controlnet.sh                        edges of the toy world on the embedded base: minutes on a laptop's CPU
#   CONDITIONING=mask ./train_controlnet.sh      by masks
#   MODEL_NAME=stable-diffusion-v1-5/stable-diffusion-v1-5 ./train_controlnet.sh      the papers' recipe on a GPU
#
# Every variable below can be set from outside; further flags follow: ./train_controlnet.sh --seed=1. Then
# ./test_controlnet.sh draws by controls that were not trained on, and ./eval_controlnet.sh scores the pictures.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$(command -v python3 || command -v python)"
  [[ -x "$HERE/.venv/bin/python" ]] && PYTHON="$HERE/.venv/bin/python"
fi
EMBEDDED="$HERE/data/toyworld"
MODEL_NAME="${MODEL_NAME:-$EMBEDDED/base}"
OUTPUT_DIR="${OUTPUT_DIR:-$HERE/data/output/controlnet}"
PROJECT_NAME="${PROJECT_NAME:-controlnet}"
RUN_NAME="${RUN_NAME:-$(basename "$OUTPUT_DIR")}"

if [[ "$MODEL_NAME" == "$EMBEDDED/base" ]]; then
  # 64 pixels on a CPU. Control sets in within the first 50 steps; the rest makes it exact.
  SETTINGS=(
    --dataset_name=toyworld --conditioning="${CONDITIONING:-edges}" --conditioning_channels=1
    --train_batch_size=8 --max_train_steps="${STEPS:-300}"
    --boft_block_size="${BLOCK_SIZE:-8}" --boft_n_butterfly_factor="${FACTORS:-2}" --boft_target_modules all
    --learning_rate="${LEARNING_RATE:-1e-3}" --boft_scale_learning_rate="${SCALE_RATE:-2e-4}"
    --control_learning_rate="${CONTROL_RATE:-1e-3}" --lr_scheduler=cosine --lr_warmup_steps=10 --adam_weight_decay=0
    --proportion_empty_prompts=0.1 --guidance_scale=3 --num_inference_steps=20 --sample_batch_size=16
    --validation_steps=50 --checkpointing_steps=100 --report_to="${REPORT_TO:-tensorboard}"
  )
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')}"
else
  # The papers' recipe (512 pixels, a GPU), with a real butterfly: 8 blocks a layer, 2 factors. Another data set:
  # DATASET_NAME, or --train_data_dir behind the script's name; --conditioning=canny makes controls from the images.
  SETTINGS=(
    --resolution="${RESOLUTION:-512}" --train_batch_size="${BATCH_SIZE:-4}" --num_dataloader_workers=2
    --max_train_steps="${STEPS:-50000}"
    --boft_block_num="${BLOCK_NUM:-8}" --boft_block_size=0 --boft_n_butterfly_factor="${FACTORS:-2}"
    --boft_dropout=0.1 --boft_bias=boft_only
    --learning_rate="${LEARNING_RATE:-1e-5}" --lr_scheduler=constant --lr_warmup_steps=0
    --validation_steps=2000 --checkpointing_steps=5000 --report_to="${REPORT_TO:-wandb}"
  )
  if [[ " $* " != *" --train_data_dir"* && " $* " != *" --dataset_name"* ]]; then
    SETTINGS+=(--dataset_name="${DATASET_NAME:-fusing/fill50k}")
  fi
  if "$PYTHON" -c 'import torch, xformers; assert torch.cuda.is_available()' 2> /dev/null; then
    SETTINGS+=(--enable_xformers_memory_efficient_attention)
  fi
fi

# Several GPUs, or a machine with an accelerate configuration: accelerate starts the processes.
LAUNCH=("$PYTHON")
if [[ -n "${ACCELERATE:-}" || -f "${HF_HOME:-$HOME/.cache/huggingface}/accelerate/default_config.yaml" ]]; then
  LAUNCH=("$PYTHON" -m accelerate.commands.launch ${ACCELERATE:-})
fi

exec "${LAUNCH[@]}" "$HERE/train_controlnet.py" \
  --pretrained_model_name_or_path="$MODEL_NAME" \
  --output_dir="$OUTPUT_DIR" --overwrite_output_dir \
  --wandb_project_name="$PROJECT_NAME" --wandb_run_name="$RUN_NAME" \
  --controlnet=light --use_boft \
  "${SETTINGS[@]}" "$@"
