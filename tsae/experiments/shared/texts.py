"""Activations of labelled texts: harvested once per language model, layer and texts, shared by all that read them.

    texts = harvest_dataset(subject, "embedded")              # the texts that `experiments.texts` asks for
    texts = harvest_texts(subject, [LabelledText(…), …], 128) # or any others
    x = texts.read([0, 5])                                    # activations [n, L, D]
    f = texts.features(subject, rows, positions)              # feature activations of single tokens

One text is one sequence of at most `context_length` tokens. The activations are kept as a store under
TSAE_HOME/stores, named after the model, the hook point and a hash of the tokens; a harvest that was killed continues.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.config import schema
from tsae.config.experiments import TextsConfig
from tsae.config.run import RunConfig
from tsae.data.contexts import Contexts, starts_with_bos
from tsae.data.labelled import EMBEDDED, LabelledText, default_classes, labelled_texts
from tsae.data.tokenized import encodable
from tsae.experiments.shared.subject import Subject
from tsae.runtime import locks, preemption
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError, suggestion
from tsae.runtime.progress import Progress
from tsae.store.binding import model_identity
from tsae.store.filling import write_missing
from tsae.store.layout import StoreLayout, store_path
from tsae.store.reader import Store
from tsae.store.writer import prepare

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MAX_CHARACTERS = 20_000
"""A longer text is cut here, well behind what a language model reads of it."""
MAX_READ = 50_000
"""Texts looked at for classes that nobody named."""
SMALLEST_CLASS = 8
"""A class that nobody named and that has fewer texts is left out."""


def draw_texts(dataset: str, wanted: TextsConfig) -> list[LabelledText]:
    """The first texts of each class that are long enough, in the order of the dataset.

    Reading ends when the classes that were named have their shares. Raises TsaeError for a class without texts and if
    no class is left.
    """
    for name, least in (("count", 1), ("context_length", 2), ("min_characters", 1)):
        if getattr(wanted, name) < least:
            raise TsaeError(f"experiments.texts.{name}: {getattr(wanted, name)} is impossible; at least {least}")
    classes = wanted.classes or default_classes(dataset)
    share = wanted.count if classes is None else -(-wanted.count // len(classes))
    found: dict[str, list[tuple[int, LabelledText]]] = {name: [] for name in classes} if classes else defaultdict(list)
    texts = labelled_texts(dataset, categories=wanted.categories, subset=wanted.subset, split=wanted.split)
    progress, longest, seen = Progress("labelled texts", None, "texts"), 0, set()
    for number, text in enumerate(texts):
        seen.add(text.label)
        longest = max(longest, len(text.text))
        if len(text.text) >= wanted.min_characters and (classes is None or text.label in found):
            kept = found[text.label]
            if len(kept) < share:
                kept.append((number, text._replace(text=encodable(text.text[:MAX_CHARACTERS]))))
        if number % 1000 == 999:
            progress.update(number + 1)
        full = classes is not None and all(len(kept) == share for kept in found.values())
        if full or (classes is None and number + 1 >= MAX_READ):
            break
    if classes is None:
        found = {name: kept for name, kept in found.items() if len(kept) >= SMALLEST_CLASS}
        share = _share([len(kept) for kept in found.values()], wanted.count)
    _refuse_empty(dataset, found, seen, wanted.min_characters, longest)
    return [text for _, text in sorted((entry for kept in found.values() for entry in kept[:share]), key=_number)]


def sample_texts(dataset: str, wanted: TextsConfig, count: int, characters: int) -> list[LabelledText]:
    """`count` texts of the classes, each as likely as any other, so that classes have their shares of the dataset.

    Of the first `MAX_READ` texts of the classes, in the order of the dataset, always the same ones; each cut to
    `characters`. Raises TsaeError if there is none.
    """
    classes = wanted.classes or default_classes(dataset)
    texts = labelled_texts(dataset, categories=wanted.categories, subset=wanted.subset, split=wanted.split)
    progress, random, seen = Progress("labelled texts", None, "texts"), np.random.default_rng(0), set()
    kept: list[tuple[int, LabelledText]] = []
    number = 0
    for text in texts:
        seen.add(text.label)
        if classes is not None and text.label not in classes:
            continue
        # A reservoir: the nth text takes the place of one of the kept with a chance of count / n.
        place = number if number < count else int(random.integers(number + 1))
        if place < count:
            kept[place : place + 1] = [(number, text._replace(text=encodable(text.text[:characters])))]
        number += 1
        progress.update(number)
        if number == MAX_READ:
            break
    if not kept:
        _refuse_empty(dataset, {name: [] for name in classes or ()}, seen, 1, 0)
    return [text for _, text in sorted(kept, key=_number)]


def _number(entry: tuple[int, LabelledText]) -> int:
    return entry[0]


def _share(sizes: list[int], count: int) -> int:
    """The largest share of each class, where there is as much, with which no more than `count` texts are taken."""
    share = max(sizes, default=0)
    while share > 1 and sum(min(size, share) for size in sizes) > count:
        share -= 1
    return share


def _refuse_empty(
    dataset: str, found: dict[str, list[tuple[int, LabelledText]]], seen: Iterable[str], shortest: int, longest: int
) -> None:
    names = sorted(seen)
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    for name, kept in found.items():
        if not kept:
            hint = "" if name in names else suggestion(name, names)
            raise TsaeError(
                f"--dataset {dataset}: no text of {shortest} characters or more in class '{name}'; {hint}"
                f"classes found: {listed or 'none'}"
            )
    if not found:
        raise TsaeError(
            f"--dataset {dataset}: no class has {SMALLEST_CLASS} texts of {shortest} characters or more "
            f"(experiments.texts.min_characters; the longest text has {longest}); classes found: {listed or 'none'}"
        )


TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class TextActivations:
    """S texts, cut to at most L tokens, and their activations."""

    texts: tuple[LabelledText, ...]
    tokens: np.ndarray
    """[S, L] int32, padded on the right."""
    lengths: np.ndarray
    """[S] int32: tokens of each text that were read, BOS included."""
    offsets: np.ndarray
    """[S, L, 2] int32: first character of each token in its text and the one after its last; 0, 0 for BOS and padding."""
    label: np.ndarray
    """[S] int32: index into `label_names`."""
    label_names: tuple[str, ...]
    valid: np.ndarray
    """[S, L] bool: tokens of the text that count: without the `data.skip_positions` first positions and, as in training,
    those that are left out for their norm or their id."""
    store: Store

    @property
    def group(self) -> np.ndarray:
        """[S] int64: texts of one group belong together and never stand on both sides of a split."""
        return np.array([text.group for text in self.texts], np.int64)

    @property
    def same_text(self) -> np.ndarray:
        """[S] int64: a number for each text as far as it was read; equal ones, blanks apart, have one number."""
        ends = self.offsets[..., 1].max(1)
        read = [" ".join(text.text[:end].split()) for text, end in zip(self.texts, ends, strict=True)]
        return np.unique(read, return_inverse=True)[1]

    @property
    def group_of_copies(self) -> np.ndarray:
        """[S] int64: as `group`, with groups in one that have a text in common; numbered by the smallest of them."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        group, text = np.unique(self.group, return_inverse=True)[1], self.same_text
        nodes = int(group.max()) + int(text.max()) + 2
        edges = (np.ones(len(group)), (group, text + group.max() + 1))
        joined = connected_components(coo_array(edges, shape=(nodes, nodes)), directed=False)[1][group]
        smallest = np.full(nodes, self.group.max())
        np.minimum.at(smallest, joined, self.group)
        return smallest[joined]

    def read(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Activations [n, L, D] float32 of the texts `rows`; meaningless at padding."""
        return self.store.read(rows).float()

    def token(self, row: int, position: int) -> str:
        """The characters of one token, as they stand in the text."""
        first, end = self.offsets[row, position]
        return self.texts[row].text[first:end]

    def features(self, subject: Subject, rows: np.ndarray, positions: np.ndarray) -> csr_array | np.ndarray:
        """Feature activations of N tokens, in their order: sparse [N, F], or of the dense baseline [N, D] float32."""
        from scipy.sparse import csr_array, vstack

        order = np.argsort(rows, kind="stable")
        back = np.argsort(order, kind="stable")
        parts: list[Any] = []
        for x in preemption.polled(self._tokens(rows[order], positions[order])):
            if subject.is_dense:
                parts.append(x.numpy())
            else:
                code = subject.codes(x)
                shape = (len(x), code.dict_size)
                entries = (code.values.numpy(), code.latents.numpy(), code.offsets.numpy())
                parts.append(csr_array(entries, shape=shape))
        return np.concatenate(parts)[back] if subject.is_dense else vstack(parts, format="csr")[back]

    def _tokens(self, rows: np.ndarray, positions: np.ndarray) -> Iterator[Tensor]:
        """Activations [n, D] of tokens of ascending texts, a bounded number of texts at a time."""
        step = max(1, TOKENS_AT_ONCE // self.tokens.shape[1])
        wanted = np.unique(rows)
        for start in range(0, len(wanted), step):
            batch = wanted[start : start + step]
            first, end = np.searchsorted(rows, batch[0]), np.searchsorted(rows, batch[-1], side="right")
            place = torch.from_numpy(np.searchsorted(batch, rows[first:end]))
            yield self.read(batch)[place, torch.from_numpy(positions[first:end].astype(np.int64))]


def harvest_dataset(subject: Subject, dataset: str) -> TextActivations:
    """The texts of `dataset` that `experiments.texts` asks for, the same for every experiment and run."""
    wanted = subject.config.experiments.texts
    return harvest_texts(subject, draw_texts(dataset, wanted), wanted.context_length)


def harvest_texts(
    subject: Subject, texts: Sequence[LabelledText], context_length: int, last: int | None = None
) -> TextActivations:
    """Activations of `texts`, each cut to `context_length` tokens; read by the language model only if not kept already.

    With `last`, texts are read without BOS, and the last so many tokens of what was read are kept, all of them valid.
    Raises TsaeError for a text without tokens and for activations that are not finite.
    """
    config = subject.config
    if not texts:
        raise TsaeError("labelled texts: none were given")
    if config.without_text:
        raise TsaeError(f"{subject.run.path}: was trained on {config.without_text}, without text to experiment with")
    texts = [text._replace(text=encodable(text.text)) for text in texts]
    read = _tokenise(texts, subject, context_length, "never" if last else config.data.bos)
    tokens, lengths, offsets = kept = read if last is None else _ends(read, last)
    names = tuple(sorted({text.label for text in texts}))
    label = np.array([names.index(text.label) for text in texts], np.int32)
    position = np.arange(tokens.shape[1])
    real = (position < lengths[:, None]) & (offsets[..., 1] > offsets[..., 0])
    document = np.where(real, np.arange(len(texts), dtype=np.int32)[:, None], -1).astype(np.int32)
    what = [*read[:2], *(kept[:2] if last else ())]
    fingerprint = hashlib.sha256(b"".join(array.tobytes() for array in what)).hexdigest()
    contexts = Contexts(tokens, lengths, document, label, names, 0, fingerprint)
    store = _harvest(subject, contexts, read)
    # The released probes take the last tokens whatever they are.
    valid = position < lengths[:, None] if last else store.valid(config.counted, limit=subject.norm_limit)
    return TextActivations(tuple(texts), tokens, lengths, offsets, label, names, valid, store)


class _Tokenised(NamedTuple):
    """S texts of at most L tokens, padded on the right."""

    tokens: np.ndarray
    """[S, L]"""
    lengths: np.ndarray
    """[S]"""
    offsets: np.ndarray
    """[S, L, 2]"""


def _ends(read: _Tokenised, last: int) -> _Tokenised:
    """The last tokens of each text, at most so many."""
    lengths = np.minimum(read.lengths, last)
    places = np.arange(last)
    found = np.where(places < lengths[:, None], (read.lengths - lengths)[:, None] + places, 0)
    tokens = np.take_along_axis(read.tokens, found, axis=1) * (places < lengths[:, None])
    offsets = np.take_along_axis(read.offsets, found[..., None], axis=1) * (places < lengths[:, None])[..., None]
    return _Tokenised(tokens.astype(np.int32), lengths, offsets.astype(np.int32))


def _tokenise(texts: Sequence[LabelledText], subject: Subject, context_length: int, bos: str) -> _Tokenised:
    """The texts, with BOS as `bos` says (see `data.bos`)."""
    tokenizer = subject.tokenizer
    with_bos = bos == "always" or (bos == "auto" and starts_with_bos(tokenizer))
    if with_bos and tokenizer.bos_token_id is None:
        raise TsaeError("data.bos: the tokenizer has no BOS token; auto or never are possible")
    first = int(with_bos)
    tokens = np.zeros((len(texts), context_length), np.int32)
    lengths = np.zeros(len(texts), np.int32)
    offsets = np.zeros((len(texts), context_length, 2), np.int32)
    tokens[:, :first] = tokenizer.bos_token_id if with_bos else 0
    for row, text in enumerate(preemption.polled(texts)):
        found = tokenizer(
            text.text,
            add_special_tokens=False,
            split_special_tokens=not text.templated,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids = found["input_ids"][: context_length - first]
        if not ids:
            raise TsaeError(f"text {row} ({text.label}): has no tokens; leave empty texts out")
        lengths[row] = first + len(ids)
        tokens[row, first : lengths[row]] = ids
        offsets[row, first : lengths[row]] = found["offset_mapping"][: len(ids)]
    return _Tokenised(tokens, lengths, offsets)


def _harvest(subject: Subject, contexts: Contexts, read: _Tokenised) -> Store:
    """The store of these contexts' activations; what another process is harvesting is waited for.

    The language model reads the texts `read`, whose ends the contexts are.
    """
    key = _key(subject, contexts)
    layout = StoreLayout(_path(subject.config, key))
    lock = layout.path.with_name(f"{layout.path.name}.harvest.lock")
    if layout.exists() and layout.is_whole():
        locks.clear(lock.parent, lock.name)
    else:
        with locks.hold_when_free(lock, str(layout.path)):
            if not (layout.exists() and layout.is_whole()):
                _write(subject, layout, contexts, read, key)
    return Store.open(layout.path)


def _write(subject: Subject, layout: StoreLayout, contexts: Contexts, read: _Tokenised, key: str) -> None:
    """Whatever is missing of the store."""
    lm = subject.language_model
    length = read.tokens.shape[1]
    if lm.max_length is not None and length > lm.max_length:
        raise TsaeError(
            f"experiments.texts.context_length: {length} is impossible; {subject.config.model.name} has {lm.max_length} positions"
        )
    packages = ("tsae", "zarr", "torch", "transformers", "nnsight")
    attributes = {
        "config_hash": key,
        "model": lm.identity,
        "packages": {name: version(name) for name in packages},
    }
    prepare(layout.path, contexts, lm.activation_dim, store=subject.config.store, attributes=attributes)
    progress = Progress("harvest of labelled texts", len(contexts.lengths), "texts", layout.progress)
    rows = layout.geometry.sequences_of
    write_missing(
        [layout],
        range(layout.geometry.shards),
        lambda shard, _: ([x] for x in _activations(subject, read, contexts, rows(shard), progress)),
    )


def _activations(
    subject: Subject, read: _Tokenised, contexts: Contexts, rows: range, progress: Progress
) -> Iterator[Tensor]:
    from tsae.lm.model import readings

    step, kept = subject.config.model.batch_size, contexts.tokens.shape[1]
    whole = kept == read.tokens.shape[1]
    batches = [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]

    def inputs(batch: slice) -> tuple[Tensor, Tensor]:
        longest = read.tokens.shape[1] if whole else int(read.lengths[batch].max())
        return torch.from_numpy(read.tokens[batch, :longest]).long(), torch.from_numpy(read.lengths[batch]).long()

    coming = readings([subject.language_model], map(inputs, preemption.polled(batches)))
    for batch, (x,) in zip(batches, coming, strict=True):
        if not whole:
            first = (torch.from_numpy(read.lengths[batch]).long() - kept).clamp_min(0)[:, None]
            places = (first + torch.arange(kept)).clamp_max(x.shape[1] - 1).to(x.device)
            x = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        yield x
        progress.update(batch.stop)


def _key(subject: Subject, contexts: Contexts) -> str:
    """Hash of all that decides the activations: language model, hook point, precision and tokens."""
    config = subject.config
    model = schema.identity(config.model)
    del model["device"], model["batch_size"]
    return schema.stable_hash(
        [model, model_identity(config.model, subject.run), config.store.dtype, contexts.fingerprint]
    )


def _path(config: RunConfig, key: str) -> Path:
    model = Path(config.model.name.rstrip("/")).name
    hook = config.model.hook_point or f"layer{config.model.layer}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"texts-{model}-{hook}")
    return home() / "stores" / f"{name[:80]}-{key}"


def texts_read(subject: Subject, texts: TextActivations, dataset: str) -> dict[str, Any]:
    """What results say of their texts; `seen_in_training` is None where the run's store is not at hand."""
    return {
        "dataset": dataset,
        "texts": len(texts.texts),
        "classes": {name: int((texts.label == i).sum()) for i, name in enumerate(texts.label_names)},
        "tokens": int(texts.valid.sum()),
        "seen_in_training": _seen_in_training(subject, texts, dataset),
    }


def _seen_in_training(subject: Subject, texts: TextActivations, dataset: str) -> int | None:
    """How many of the embedded corpus's documents, whose groups are their numbers, the dictionary was trained on."""
    config = subject.config
    if subject.is_dense:
        return 0
    if not dataset == config.data.source == EMBEDDED:
        return None
    layout = StoreLayout(store_path(config))
    if not layout.exists():
        return None
    trained = np.unique(layout.document[: layout.geometry.sequences - layout.heldout])
    return int(np.isin(texts.group, trained).sum())
