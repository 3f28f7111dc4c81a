#!/usr/bin/env bash
# Light control with BOFT: a hint encoder reads the control image, BOFT adapts the UNet to heed it. By the settings of
# recipes/controlnet-embedded.yaml or, on other base models, recipes/controlnet.yaml.
#
#   ./train_controlnet.sh                        edges of the toy world on the embedded base: minutes on a laptop's CPU
#   CONDITIONING=mask ./train_controlnet.sh      by masks
#   MODEL_NAME=stable-diffusion-v1-5/stable-diffusion-v1-5 ./train_controlnet.sh      the papers' recipe on a GPU
#   ./train_controlnet.sh --train_data_dir=photos --conditioning=canny                on images of your own
#
# These variables can be set from outside: MODEL_NAME, OUTPUT_DIR, DATASET_NAME, CONDITIONING, STEPS, BATCH_SIZE,
# LEARNING_RATE, SCALE_RATE, CONTROL_RATE, BLOCK_SIZE or BLOCK_NUM, FACTORS, RESOLUTION, REPORT_TO, PROJECT_NAME,
# RUN_NAME; ACCELERATE holds flags of accelerate launch. Further flags follow: ./train_controlnet.sh --seed=1. Then
# ./test_controlnet.sh draws by controls that were not trained on, and ./eval_controlnet.sh scores the pictures.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$(command -v python3 || command -v python)"
  [[ -x "$HERE/.venv/bin/python" ]] && PYTHON="$HERE/.venv/bin/python"
fi
exec "$PYTHON" "$HERE/scripts/quickstart.py" controlnet --only_train "$@"
