"""Documents of a Hugging Face dataset: streamed from the hub, or from what an offline machine has of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from tsae.config.sections import DataConfig
from tsae.data.records import Document, documents_of
from tsae.runtime.errors import TsaeError


def read_hub(data: DataConfig) -> Iterator[Document]:
    """The documents of one split of a dataset, streamed in its order. Raises TsaeError.

    `data.source` is a hub id or a local folder in the hub's format. With HF_HUB_OFFLINE=1 the snapshot in the local
    hub cache is read.
    """
    dataset = open_dataset(data.source, data.split, subset=data.subset, revision=data.revision)
    features = getattr(dataset, "features", None) or {}
    names = getattr(features.get(data.label_field), "names", None)
    rows = ((data.source, _with_label_name(row, data.label_field, names)) for row in dataset)
    try:
        yield from documents_of(rows, data)
    except TsaeError:
        raise
    except Exception as error:  # the network, a decoder or a builder: `datasets` has no common class for them
        raise TsaeError(f"data.source: {data.source}: reading stopped: {_reason(error)}") from error


def _with_label_name(row: Any, field: str | None, names: list[str] | None) -> Any:
    """A ClassLabel column holds indices; its name is the label."""
    if names is None or field is None or not isinstance(row.get(field), int) or row[field] < 0:
        return row
    return {**row, field: names[row[field]]}


def quiet_datasets() -> Any:
    """The module `datasets`, which leaves it to us to say what is wrong."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def open_dataset(
    source: str,
    split: str,
    *,
    subset: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    setting: str = "data.source",
) -> Any:
    """One split of the dataset `source`, as a stream of rows. Raises TsaeError, naming the `setting` that chose it."""
    from huggingface_hub import constants

    datasets = quiet_datasets()
    last: Exception | None = None
    # `datasets` looks into its own cache when the hub is out of reach, but not into the hub's.
    snapshot = _snapshot(source, revision) if constants.HF_HUB_OFFLINE else None
    for place in (source,) if snapshot is None else (snapshot, source):
        try:
            return datasets.load_dataset(
                place,
                subset,
                split=split,
                data_dir=data_dir,
                revision=revision if place == source else None,
                streaming=True,
            )
        except (FileNotFoundError, ConnectionError) as error:
            last = error
        except Exception as error:
            raise TsaeError(f"{setting}: {source}: {_reason(error)}") from error
    reached = isinstance(last, FileNotFoundError)
    remedy = (
        "check the id, or give an existing path"
        if reached and not constants.HF_HUB_OFFLINE
        else f"pre-download on a machine with network: hf download {source} --repo-type dataset; "
        "then set HF_HUB_OFFLINE=1"
    )
    raise TsaeError(
        f"{setting}: {source}: neither a local file or folder nor a dataset that can be "
        f"reached ({_reason(last)}); {remedy}"
    ) from last


def _snapshot(source: str, revision: str | None) -> str | None:
    """The dataset's folder in the local hub cache, if it was downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return huggingface_hub.snapshot_download(source, repo_type="dataset", revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):  # not in the cache, or a path rather than an id
        return None


def _reason(error: BaseException | None) -> str:
    first = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first[0] if first else ''}"
