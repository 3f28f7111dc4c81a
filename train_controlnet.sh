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
  # 64 pixels on a CPU. Control sets in within the first 50 steps; the rest makes it exact. b=8 and m=2 are those of
  # train_dreambooth.sh, where docs/results.md compares them; scripts/compare_controls.yaml does so for control.
  SETTINGS=(
    --dataset_name=toyworld                             # scenes without end
    --conditioning="${CONDITIONING:-edges}"             # the renderer's, or mask and others, see --help
    --conditioning_channels=1                           # controls are grey
    --train_batch_size=8                                # as many scenes a step
    --max_train_steps="${STEPS:-300}"                   # minutes
    --boft_block_size="${BLOCK_SIZE:-8}"                # b: fits all widths of this UNet
    --boft_n_butterfly_factor="${FACTORS:-2}"           # m: a real butterfly, 16 features are mixed by one rotation
    --boft_target_modules all                           # convolutions too: details arise where no attention is
    --learning_rate="${LEARNING_RATE:-1e-3}"            # of the rotations
    --boft_scale_learning_rate="${SCALE_RATE:-2e-4}"    # a fifth of it
    --control_learning_rate="${CONTROL_RATE:-1e-3}"     # of the hint encoder, which starts from nothing
    --lr_scheduler=cosine --lr_warmup_steps=10          # up at once, then down to 0
    --adam_weight_decay=0                               # it would pull the rotation back to the base
    --proportion_empty_prompts=0.1                      # guidance needs the answer to no prompt
    --guidance_scale=3 --num_inference_steps=20         # of the pictures
    --sample_batch_size=16                              # pictures at a time
    --validation_steps=50 --checkpointing_steps=100
    --report_to="${REPORT_TO:-tensorboard}"
  )
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')}"
else
  # The papers' recipe (512 pixels, a GPU), but with a real butterfly. Another data set: DATASET_NAME, or
  # --train_data_dir behind the script's name; --conditioning=canny makes controls from the images.
  SETTINGS=(
    --resolution="${RESOLUTION:-512}"                   # of Stable Diffusion 1.x
    --train_batch_size="${BATCH_SIZE:-4}"               # no GPU was there to try how many fit
    --num_dataloader_workers=2                          # they read images ahead
    --max_train_steps="${STEPS:-50000}"                 # four passes over fill50k at this batch
    --boft_block_num="${BLOCK_NUM:-8}"                  # 8 blocks a layer, whatever its width
    --boft_block_size=0                                 # follows from their number
    --boft_n_butterfly_factor="${FACTORS:-2}"           # m: 1 is the recipe's own, a block-diagonal rotation
    --boft_dropout=0.1 --boft_bias=boft_only            # a tenth of the blocks rest; biases of adapted layers learn
    --learning_rate="${LEARNING_RATE:-1e-5}"            # the recipe's
    --lr_scheduler=constant --lr_warmup_steps=0
    --validation_steps=2000 --checkpointing_steps=5000
    --report_to="${REPORT_TO:-wandb}"                   # offline where there is no key
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
