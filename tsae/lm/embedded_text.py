"""The text side of the embedded language model: document split, byte-level BPE, rows, n-gram baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tsae.data.documents import Document

END = "<|endoftext|>"
SPLIT_RULE = "held out: first 8 bytes (big-endian) of sha256(text) % 20 == 0"
BIGRAM_STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)


class Rows(NamedTuple):
    """Contexts cut from documents, in document order."""

    tokens: np.ndarray  # [S, L] int64, right-padded with 0
    lengths: np.ndarray  # [S] int64
    label: np.ndarray  # [S] int64, index into the label names


def is_held_out(text: str) -> bool:
    """Whether a document is kept from training: one in twenty, by the hash of its text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 20 == 0


def train_tokenizer(texts: Iterable[str], vocabulary: int, context_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with one special token, which ends a text and pads; it never adds tokens by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_rows(
    documents: list[Document],
    tokenizer: PreTrainedTokenizerFast,
    label_names: tuple[str, ...],
    context_length: int,
    min_length: int,
) -> Rows:
    """Rows of at most `context_length` tokens: every document is split, no row crosses documents, no BOS."""
    tokens, lengths, labels = [], [], []
    encoded = tokenizer(
        [document.text for document in documents], add_special_tokens=False, split_special_tokens=True, verbose=False
    )
    for document, ids in zip(documents, encoded["input_ids"], strict=True):
        for start in range(0, len(ids), context_length):
            piece = ids[start : start + context_length]
            if len(piece) < min_length:
                continue
            tokens.append(piece + [0] * (context_length - len(piece)))
            lengths.append(len(piece))
            labels.append(label_names.index(document.label or ""))
    return Rows(np.array(tokens), np.array(lengths), np.array(labels))


def predicted_mask(rows: Rows) -> np.ndarray:
    """[S, L-1] bool: the positions 1… of each row that hold a real token, which every model here predicts."""
    return np.arange(1, rows.tokens.shape[1])[None, :] < rows.lengths[:, None]


def ngram_losses(train: Rows, heldout: Rows, vocabulary: int) -> tuple[float, float]:
    """Held-out loss in nats per token of a unigram (add-one) and of an interpolated bigram model.

    The bigram backs off to the unigram with weight `a·types / (count + a·types)` of the previous token (Witten-Bell);
    the best `a` of BIGRAM_STRENGTHS on the held-out rows is taken, which favours the baseline.
    """
    real = np.arange(train.tokens.shape[1])[None, :] < train.lengths[:, None]
    counts = np.bincount(train.tokens[real], minlength=vocabulary) + 1.0
    unigram = counts / counts.sum()

    mask = predicted_mask(train)
    keys = train.tokens[:, :-1][mask] * vocabulary + train.tokens[:, 1:][mask]
    pairs = np.bincount(keys, minlength=vocabulary**2).reshape(vocabulary, vocabulary)
    total, types = pairs.sum(1), (pairs > 0).sum(1)

    mask = predicted_mask(heldout)
    previous, current = heldout.tokens[:, :-1][mask], heldout.tokens[:, 1:][mask]
    losses = []
    for strength in BIGRAM_STRENGTHS:
        backoff = strength * np.maximum(types[previous], 1)
        likelihood = (pairs[previous, current] + backoff * unigram[current]) / (total[previous] + backoff)
        losses.append(float(-np.log(likelihood).mean()))
    return float(-np.log(unigram[current]).mean()), min(losses)
