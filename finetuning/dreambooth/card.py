"""The README.md of a DreamBooth run's output folder."""

from __future__ import annotations

from pathlib import Path

from finetuning.files import write
from finetuning.publishing.model_card import facts_of, model_card
from finetuning.run_folder import CARD
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.training.training import Training


def write_card(folder: Path, config: DreamBoothConfig, base: str, training: Training, picture: Path | None) -> None:
    """What was trained, on what, how to use it. base: name of the base model; picture: of before and after."""
    card = model_card(
        title=config.subject.instance_prompt,
        base=base,
        kind=config.adapter.kind,
        folder=str(folder),
        prompt=config.subject.instance_prompt,
        facts={
            "method": config.adapter.kind,
            **facts_of(config, numbers=training.count(), steps=training.number, batch=training.total_batch),
        },
        picture=picture and picture.name,
        prompts=config.validation.validation_prompt,
        pipeline=type(training.base.pipeline()).__name__,
        parts=list(training.adapters),
        stock_peft=config.adapter.boft_n_butterfly_factor == 1,
    )
    write(folder / CARD, card)
