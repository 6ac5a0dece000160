"""Which labelled texts an experiment reads: equal shares of the classes, the same for every run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from tsae.config.experiments import TextsConfig
from tsae.data.labelled import LabelledText, default_classes, labelled_texts
from tsae.data.tokens import encodable
from tsae.runtime.errors import TsaeError, suggestion
from tsae.runtime.progress import Progress

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
