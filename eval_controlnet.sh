#!/usr/bin/env bash
# Score how the pictures of ./test_controlnet.sh follow their controls, beside pictures without control and real ones;
# what is missing is drawn.
#
#   ./eval_controlnet.sh                                          data/output/controlnet/evaluation/scores.md
#   OUTPUT_DIR=runs/mine ./eval_controlnet.sh --segmentation_model=nvidia/segformer-b5-finetuned-ade-640-640
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$(command -v python3 || command -v python)"
  [[ -x "$HERE/.venv/bin/python" ]] && PYTHON="$HERE/.venv/bin/python"
fi
OUTPUT_DIR="${OUTPUT_DIR:-$HERE/data/output/controlnet}"
exec "$PYTHON" "$HERE/scripts/evaluate.py" controlnet "$OUTPUT_DIR" ${IMAGES:+--images="$IMAGES"} "$@"
