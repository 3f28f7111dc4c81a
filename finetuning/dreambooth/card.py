"""The README.md of a DreamBooth run's output folder."""

from __future__ import annotations

from pathlib import Path

from finetuning.files import write
from finetuning.publishing.model_card import model_card, parameter_rows
from finetuning.run_folder import CARD
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.types import required
from finetuning.training.training import Training


def write_card(folder: Path, config: DreamBoothConfig, base: str, training: Training, picture: Path | None) -> None:
    """Write the card: what was trained, on what, and how to use it.

    Args:
        folder: the run's output folder.
        config: the run's settings.
        base: name of the base model.
        training: of the run, at its end.
        picture: of before and after, in the folder. None = there is none.
    """
    prompt = required(config.subject.instance_prompt, "--instance_prompt")
    card = model_card(
        title=prompt,
        base=base,
        kind=config.adapter.kind,
        folder=str(folder),
        prompt=prompt,
        facts={
            "method": config.adapter.kind,
            **parameter_rows(config, numbers=training.count(), steps=training.number, batch=training.total_batch),
        },
        picture=picture.name if picture else None,
        prompts=config.validation.validation_prompt,
        pipeline=type(training.base.pipeline()).__name__,
        parts=list(training.adapters),
        stock_peft=config.adapter.boft_n_butterfly_factor == 1,
    )
    write(folder / CARD, card)
