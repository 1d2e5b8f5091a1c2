"""Sentencepiece models of tests, as tokenizer.model holds them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import sentencepiece


def train_pieces(texts: Iterable[str], **options: Any) -> bytes:
    """Train a model on some texts; it may stay smaller than `vocab_size`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


def train_llama_pieces(texts: Iterable[str], **options: Any) -> bytes:
    """As Llama's: BPE, byte fallback, no normalisation."""
    return train_pieces(
        texts,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **options,
    )
