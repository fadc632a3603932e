"""A tiny CLIP text encoder and a tokenizer whose vocabulary holds letters and the steering words."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .words import FILLERS, WORDS

MAX_LENGTH = 24
"""Tokens of a prompt, start and end included; longer prompts are cut."""
START, END = "<|startoftext|>", "<|endoftext|>"


def _merges() -> list[tuple[str, str]]:
    pairs: dict[tuple[str, str], None] = {}
    for word in sorted({part for phrase in (*WORDS, *FILLERS) for part in phrase.split()}, key=lambda w: (-len(w), w)):
        letters = [*word[:-1], word[-1] + "</w>"]
        left = letters[0]
        for letter in letters[1:]:
            pairs[left, letter] = None
            left += letter
    return list(pairs)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of ASCII characters and byte pairs that make each steering word one token.

    Other words become letters, which training teaches the model to ignore.
    """
    alphabet = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    merges = _merges()
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *dict.fromkeys(a + b for a, b in merges),
        START,
        END,
    ]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, pairs = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        pairs.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH, unk_token=END, pad_token=END)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 64) -> CLIPTextModel:
    """A fresh two-layer text encoder for `tokenizer`, with `width` channels."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
