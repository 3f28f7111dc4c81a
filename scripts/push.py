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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.errors import InputError
from finetuning.publishing.hub import open_repository, uploaded_files
from finetuning.run_folder import CARD
from finetuning.settings.fields import Config, Group, read_config, run_command, setting


@dataclass
class PushSettings(Group):
    """Upload"""

    run: str | None = setting(None, "Folder of the run.")
    hub_model_id: str | None = setting(None, "Repository, owner/name. None = the folder's name, of the token's user.")
    hub_token: str | None = setting(
        None, "Token for the hub. None = the one of HF_TOKEN or of `hf auth login`.", secret=True
    )

    def faults(self) -> Iterator[str]:
        if self.run is None:
            yield "--run: needed, the folder of a run"


@dataclass
class PushConfig(Config):
    """Everything that push.py can be told."""

    upload: PushSettings


def main(argv: Sequence[str] | None = None) -> None:
    upload = read_config(PushConfig, argv, __doc__).upload
    run = Path(upload.run)
    if not (run / CARD).is_file():
        raise InputError(f"--run={run}: holds no {CARD}; give the folder of a run that has ended")
    repository = open_repository(upload.hub_model_id, upload.hub_token, run)
    print(f"{len(uploaded_files(run))} files in {repository.upload(run)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
