"""Prompts to the token ids of a CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerBase

from finetuning.config import InputError


def check_lengths(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], flag: str, limit: int | None = None
) -> None:
    """Raises InputError for each prompt of more tokens than this limit, by default the tokenizer's own."""
    limit = limit or tokenizer.model_max_length
    faults = []
    for prompt in dict.fromkeys(prompts):
        length = len(tokenizer(prompt).input_ids)
        if length > limit:
            faults.append(f"{flag}={prompt!r}: {length} tokens, the model reads {limit}; shorten the prompt")
    if faults:
        raise InputError(*faults)


def check_tokenizer(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel | CLIPTextModelWithProjection, source: str
) -> None:
    """Raises InputError where a tokenizer makes ids that the encoder does not know. source: the flag and its value."""
    positions, vocabulary = encoder.config.max_position_embeddings, encoder.config.vocab_size
    if tokenizer.model_max_length > positions or len(tokenizer) > vocabulary:  # an empty one has no limit
        raise InputError(
            f"{source}: no tokenizer of this text encoder, which reads {positions} tokens out of {vocabulary}; is it "
            "complete?"
        )


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str], cut: bool = False) -> torch.Tensor:
    """Token ids of prompts, each padded to the length that the encoder reads, (B, tokens).

    cut: what is longer; otherwise it raises ValueError.
    """
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=cut,
        return_tensors="pt",
    ).input_ids
