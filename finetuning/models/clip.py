"""Prompts to the token ids of a CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from finetuning.errors import InputError


def check_tokenizer(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel | CLIPTextModelWithProjection, source: str
) -> None:
    """Raises InputError where a tokenizer makes ids that the encoder does not know. source: the flag and its value."""
    positions, vocabulary = encoder.config.max_position_embeddings, encoder.config.vocab_size
    words = len(tokenizer.get_vocab()) - len(tokenizer.all_special_tokens)
    if tokenizer.model_max_length >= VERY_LARGE_INTEGER:  # it does not say its limit; the text encoder does
        tokenizer.model_max_length = positions
    if words <= 0 or tokenizer.model_max_length > positions or len(tokenizer) > vocabulary:
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
