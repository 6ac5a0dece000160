"""Datasets of Hugging Face: streamed from the hub, or from what an offline machine has of them."""

from __future__ import annotations

import logging
from typing import Any

from tsae.runtime.errors import TsaeError


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
            raise TsaeError(f"{setting}: {source}: {reason_of(error)}") from error
    reached = isinstance(last, FileNotFoundError)
    remedy = (
        "check the id, or give an existing path"
        if reached and not constants.HF_HUB_OFFLINE
        else f"pre-download on a machine with network: hf download {source} --repo-type dataset; "
        "then set HF_HUB_OFFLINE=1"
    )
    raise TsaeError(
        f"{setting}: {source}: neither a local file or folder nor a dataset that can be "
        f"reached ({reason_of(last)}); {remedy}"
    ) from last


def cached_commit(source: str, revision: str | None = None) -> str | None:
    """The commit that the local hub cache has of a dataset; None where it has none."""
    found = _snapshot(source, revision)
    return found and found.rstrip("/").rpartition("/")[2]


def _snapshot(source: str, revision: str | None) -> str | None:
    """The dataset's folder in the local hub cache, if it was downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return huggingface_hub.snapshot_download(source, repo_type="dataset", revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):  # not in the cache, or a path rather than an id
        return None


def reason_of(error: BaseException | None) -> str:
    """Kind and first line of an error that came out of `datasets`."""
    first = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first[0] if first else ''}"
