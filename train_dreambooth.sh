#!/usr/bin/env bash
# DreamBooth with BOFT on one subject, by the settings of recipes/dreambooth-embedded.yaml or, on other base models,
# recipes/dreambooth.yaml.
#
#   ./train_dreambooth.sh                    the embedded mug on the embedded base: minutes on a laptop's CPU
#   SUBJECT=NAME ./train_dreambooth.sh       another one of data/toyworld/subjects
#   ./train_dreambooth.sh 27                 subject 0 … 29 of google/dreambooth, in alphabetical order (27 = teapot)
#   MODEL_NAME=stable-diffusion-v1-5/stable-diffusion-v1-5 ./train_dreambooth.sh 27      the same on a GPU
#
# These variables can be set from outside: MODEL_NAME, OUTPUT_DIR, SUBJECT, UNIQUE_TOKEN, INSTANCE_DIR, INSTANCE_PROMPT,
# CLASS_DIR, CLASS_PROMPT, VALIDATION_PROMPT (prompts: one, or a .txt file with one a line), STEPS, LEARNING_RATE,
# SCALE_RATE, BLOCK_SIZE or BLOCK_NUM, FACTORS, RESOLUTION, NUM_CLASS_IMAGES, REPORT_TO, PROJECT_NAME, RUN_NAME;
# ACCELERATE holds flags of accelerate launch. Further flags go after the index: ./train_dreambooth.sh 27 --seed=1
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$(command -v python3 || command -v python)"
  [[ -x "$HERE/.venv/bin/python" ]] && PYTHON="$HERE/.venv/bin/python"
fi
exec "$PYTHON" "$HERE/scripts/quickstart.py" dreambooth --only_train "$@"
