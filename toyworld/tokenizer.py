"""The tokenizer: byte-pair encoding in CLIP's own format. A word of the world is one token, other text is several."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer

from .captions import RARE_WORDS, caption_vocabulary

MAX_LENGTH = 24  # tokens, with start and end
# Words of DreamBooth's prompts and subjects that no caption here uses: known to the tokenizer, nothing to the model.
OTHER_WORDS = tuple(
    """an and at top under to with next city mountain blue house wheat field tree autumn leaves forest eiffel
tower mirror dirt road sidewalk crowded street pink fabric white rug wooden floor sunflowers around it milky way red
purple shiny wet cube shaped wearing hat santa scarf police outfit chef toy plush animal stuffed can clock glasses
sneaker boot vase bowl cartoon figurine small big bright dark high quality blurry low""".split()  # noqa: SIM905
)


def words() -> list[str]:
    """All words that are one token each."""
    return sorted({*caption_vocabulary(), *RARE_WORDS, *OTHER_WORDS})


def build(folder: Path) -> CLIPTokenizer:
    """Build the tokenizer, save it into `folder` and load it from there."""
    reference = CLIPTokenizer()  # for CLIP's normalisation and splitting
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = reference.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = reference.backend_tokenizer.pre_tokenizer
    letters = list(string.printable[:94])
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words())] * 3 + letters, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    tokens = sorted({*model["vocab"], *letters, *(letter + "</w>" for letter in letters)})
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH).save_pretrained(folder)
    # the two files of older versions of transformers
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
