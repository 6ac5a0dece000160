"""A page of latents as the folder that Neuronpedia's importer reads: `tsae export RUN --format neuronpedia`.

MODEL/SOURCE/                                  SOURCE is LAYER-NAME, one dictionary
    model, release, sourceset, source .jsonl   what it is and whose
    features/batch-N.jsonl.gz                  2,048 latents a file: rate, histogram, raised and lowered tokens, nearest latents
    activations/, explanations/                the same latents' examples and explanations

Its texts and numbers are those of the page; activations are kept there in 255ths of a latent's largest.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tsae.checkpoint import RunFolder
from tsae.experiments.features import data
from tsae.experiments.shared.subject import Subject
from tsae.interop.folders import new_folder
from tsae.interop.settings import settings_of
from tsae.lm.unembedding import unembedding
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress

BATCH = 2048
CREATOR = "clkht01d40000jv08hvalcvly"
"""Whom the importer takes for the creator where its own settings name nobody."""


def export(run: RunFolder, out: Path) -> Path:
    """Write the new folder `out` of the page that `tsae features` made of `run`; returns it.

    Raises TsaeError where there is no such page, and for a model that has no number of a block.
    """
    page = run.result("features", "html")
    if not page.exists():
        raise TsaeError(f"{page}: not found; make it with `tsae features {run.path.parent}`")
    about, columns = data.unpack(page)
    if not isinstance(about["layer"], int):
        raise TsaeError(f"{run.path}: reads {about['layer']}; Neuronpedia orders sources by the number of a block")
    name = re.sub(r"[^a-z0-9-]+", "-", run.path.parent.name.lower()).strip("-") or "tsae"
    model = Path(about["model"].rstrip("/")).name.lower()
    source = f"{about['layer']}-{name}"
    with new_folder(out) as folder:
        place = folder / model / source
        place.mkdir(parents=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for kind, record in _heads(model, source, name, about, now).items():
            _write(place / f"{kind}.jsonl", [record])
        common = {"modelId": model, "layer": source, "createdAt": now}
        scores = _scores(run, columns)
        parts = {
            "features": lambda latent: _feature(latent, about, columns, scores),
            "activations": lambda latent: _activations(latent, about, columns),
            "explanations": lambda latent: _explanations(latent, about),
        }
        for number, first in enumerate(range(0, len(columns["rate"]), BATCH)):
            latents = range(first, min(first + BATCH, len(columns["rate"])))
            for kind, records in parts.items():
                made = ({**common, "index": str(n), **record} for n in latents for record in records(n))
                _write(place / kind / f"batch-{number}.jsonl.gz", _named(made, kind))
    return out


def _heads(model: str, source: str, name: str, about: dict[str, Any], now: str) -> dict[str, dict[str, Any]]:
    whose = {"creatorId": CREATOR, "createdAt": now}
    described = f"{about['dict_class']}, {about['dict_size']:,} latents, after block {about['layer']}"
    return {
        "model": {
            "id": model,
            "displayName": model,
            "displayNameShort": model,
            "instruct": model.endswith(("-it", "-instruct")),
            "updatedAt": now,
            **whose,
        },
        "release": {
            "name": name,
            "description": described,
            "descriptionShort": described,
            "urls": [],
            "creatorName": "tsae",
            "creatorNameShort": "tsae",
            **whose,
        },
        "sourceset": {
            "modelId": model,
            "name": name,
            "description": described,
            "creatorName": "tsae",
            "releaseName": name,
            "visibility": "PUBLIC",
            **whose,
        },
        "source": {
            "id": source,
            "modelId": model,
            "setName": name,
            "dataset": "",
            "visibility": "PUBLIC",
            "num_prompts": None,
            "num_tokens_in_prompt": None,
            "hfRepoId": None,
            "hfFolderId": None,
            "creatorId": CREATOR,
        },
    }


def _scores(run: RunFolder, columns: dict[str, np.ndarray]) -> np.ndarray | None:
    """[F, 16] what each decoder row adds to the scores of its tokens; None where the page has none."""
    if "spoken" not in columns:
        return None
    subject = Subject(settings_of(run), run)
    head = unembedding(subject.language_model)
    if head is None:
        return None
    rows = subject.dictionary.W_dec.detach().to(head.weight.device)
    return data.spoken(rows, head, Progress(f"export {subject.name}: logits", len(rows), "latents", None))[1]


def _feature(
    latent: int, about: dict[str, Any], columns: dict[str, np.ndarray], scores: np.ndarray | None
) -> Iterator[dict[str, Any]]:
    largest = float(np.nan_to_num(columns["largest"][latent]))
    heights = columns["histogram"].reshape(len(columns["rate"]), -1)[latent]
    near = columns["near_writing"].reshape(len(columns["rate"]), -1)[latent]
    there = near >= 0
    cosines = columns["near_writing_cosine"].reshape(len(columns["rate"]), -1)[latent][there] / 255
    words: list[list[str]] = [[], []]
    values: list[list[float]] = [[], []]
    if scores is not None:
        tokens = columns["spoken"].reshape(len(columns["rate"]), -1)[latent]
        half = len(tokens) // 2
        words = [[about["strings"][token] for token in part] for part in (tokens[:half], tokens[half:])]
        values = [_short(part) for part in (scores[latent, :half], scores[latent, half:])]
    empty = ("neuron_alignment", "correlated_neurons", "correlated_features")
    yield {
        "creatorId": CREATOR,
        "maxActApprox": round(largest, 4),
        "frac_nonzero": float(columns["rate"][latent]),
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "hookName": None,
        # The latent itself stands first, as where others write these.
        "topkCosSimIndices": [latent, *near[there].tolist()],
        "topkCosSimValues": [1.0, *_short(cosines)],
        "pos_str": words[0],
        "pos_values": values[0],
        "neg_str": words[1],
        "neg_values": values[1],
        "freq_hist_data_bar_heights": _short(heights / 255),
        "freq_hist_data_bar_values": _short(largest * (np.arange(len(heights)) + 0.5) / len(heights)),
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "decoder_weights_dist": [],
        **{f"{name}_{what}": [] for name in empty for what in ("indices", "l1")},
        "neuron_alignment_values": [],
        "correlated_neurons_pearson": [],
        "correlated_features_pearson": [],
    }


def _activations(latent: int, about: dict[str, Any], columns: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    for example in range(*columns["example_offsets"][latent : latent + 2].tolist()):
        start, length = int(columns["example_start"][example]), int(columns["example_length"][example])
        fired = slice(*columns["example_fired"][example : example + 2].tolist())
        values = np.zeros(length)
        values[columns["example_position"][fired]] = columns["example_value"][fired] / 255
        values *= columns["largest"][latent]
        yield {
            "creatorId": CREATOR,
            "tokens": [about["strings"][token] for token in columns["text"][start : start + length]],
            "values": _short(values),
            "maxValue": round(float(values.max()), 4),
            "maxValueTokenIndex": int(values.argmax()),
            "minValue": round(float(values.min()), 4),
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
            "binMin": None,
            "binMax": None,
            "binContains": None,
            "qualifyingTokenIndex": None,
            "dataIndex": None,
            "dataSource": None,
        }


def _explanations(latent: int, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if about["explanations"][latent] is not None:
        yield {
            "description": about["explanations"][latent],
            "authorId": CREATOR,
            "typeName": "unknown",
            "explanationModelName": "unknown",
        }


def _named(records: Iterable[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """With an identifier of their own, which features have in their index."""
    for number, record in enumerate(records):
        if kind == "features":
            yield record
        else:
            told = f"{record['modelId']} {record['layer']} {record['index']} {kind} {number}"
            yield {"id": f"c{hashlib.sha256(told.encode()).hexdigest()[:24]}", **record}


def _short(values: np.ndarray) -> list[float]:
    return np.round(np.asarray(values, float), 4).tolist()


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
