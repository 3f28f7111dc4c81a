#!/usr/bin/env bash
# Draw by controls that were not trained on: what ./train_controlnet.sh has left.
#
#   ./test_controlnet.sh                                          data/output/controlnet/evaluation/grid.png
#   OUTPUT_DIR=runs/mine IMAGES=32 ./test_controlnet.sh --guess_mode
#
# Pictures that are there are not drawn again. By a control of your own: scripts/generate.py --control image.png
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "$HERE/eval_controlnet.sh" --only_draw "$@"
