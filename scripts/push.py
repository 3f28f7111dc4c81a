#!/usr/bin/env python
"""Put the result of a run on the Hugging Face Hub, with its scores on the card.

    python scripts/push.py --run data/output/dreambooth --hub_model_id me/qwe-mug

The token is the one of `hf auth login` or of HF_TOKEN. A new repository is public; make it beforehand for a private
one. What is uploaded: the adapters or the pipeline, config.yaml, metrics, scores, pictures; no checkpoints, no logs,
no photos but those in comparison.png. Paths of this machine are shortened: below the working directory or the
repository to what follows it, others to their last name. To do the same at the end of a training run:
`train_dreambooth.py --push_to_hub`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.inference import PushConfig
from finetuning.settings.reading import parse_or_exit, read_config, run_command

if __name__ == "__main__":
    config = parse_or_exit(PushConfig, __doc__)  # before the slow imports

from finetuning.errors import InputError
from finetuning.publishing.hub import open_repository, uploaded_files
from finetuning.run_folder import CARD


def main(argv: Sequence[str] | None = None) -> None:
    push(read_config(PushConfig, argv, __doc__))


def push(config: PushConfig) -> None:
    """Check that a run has ended, and upload it."""
    upload = config.upload
    run = Path(upload.run)
    if not (run / CARD).is_file():
        raise InputError(f"--run={run}: holds no {CARD}; give the folder of a run that has ended")
    repository = open_repository(upload.hub_model_id, upload.hub_token, run)
    print(f"{len(uploaded_files(run))} files in {repository.upload(run)}")


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: push(config)))
