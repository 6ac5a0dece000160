"""Sentences with parts of speech, written for the tests, and a spaCy pipeline that learns them."""

from __future__ import annotations

from pathlib import Path

SENTENCES = """
the/DET old/ADJ captain/NOUN reads/VERB a/DET letter/NOUN ./PUNCT
a/DET small/ADJ dog/NOUN chases/VERB the/DET cat/NOUN ./PUNCT
she/PRON sings/VERB loudly/ADV in/ADP the/DET garden/NOUN ./PUNCT
they/PRON walk/VERB slowly/ADV to/ADP the/DET river/NOUN ./PUNCT
the/DET teacher/NOUN writes/VERB a/DET long/ADJ book/NOUN ./PUNCT
he/PRON quickly/ADV opens/VERB the/DET door/NOUN ./PUNCT
a/DET captain/NOUN sees/VERB the/DET small/ADJ boat/NOUN ./PUNCT
the/DET dog/NOUN sleeps/VERB under/ADP a/DET table/NOUN ./PUNCT
she/PRON reads/VERB the/DET book/NOUN in/ADP a/DET room/NOUN ./PUNCT
they/PRON chase/VERB a/DET boat/NOUN on/ADP the/DET river/NOUN ./PUNCT
an/DET old/ADJ cat/NOUN walks/VERB slowly/ADV ./PUNCT
he/PRON writes/VERB a/DET letter/NOUN to/ADP the/DET teacher/NOUN ./PUNCT
"""


def train_pipeline(folder: Path) -> Path:
    """A pipeline saved in `folder` that gives the parts of speech of words like those above; takes about a second."""
    import random

    import spacy
    from spacy.tokens import Doc
    from spacy.training import Example

    random.seed(0)
    spacy.util.fix_random_seed(0)
    pipeline = spacy.blank("en")
    pipeline.add_pipe("morphologizer")
    examples = []
    for line in SENTENCES.strip().splitlines():
        words, tags = zip(*(pair.rsplit("/", 1) for pair in line.split()), strict=True)
        truth = Doc(pipeline.vocab, words=list(words), pos=list(tags))
        examples.append(Example(pipeline.make_doc(truth.text), truth))
    optimizer = pipeline.initialize(lambda: examples)
    for _ in range(12):
        random.shuffle(examples)
        pipeline.update(examples, sgd=optimizer)
    pipeline.to_disk(folder)
    return folder
