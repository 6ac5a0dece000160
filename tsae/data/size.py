"""How much text there is, before it is read: an estimate, from the sizes of files and the limits of the settings."""

from __future__ import annotations

from tsae.config.sections import DataConfig
from tsae.data.documents import EMBEDDED, may_stop_early, source_files

BYTES_PER_TOKEN = 4
"""Of prose, in the vocabularies of today's models."""
COMPRESSED = {".gz": 3, ".zst": 3, ".parquet": 2}
"""How many bytes of text stand for one on the disk."""
EMBEDDED_TOKENS = 10_000_000
"""Of the embedded corpus, about; machines differ."""


def tokens_of(data: DataConfig) -> int | None:
    """About how many tokens a store of this text has at most; None where nothing but its end bounds it.

    Raises TsaeError for a path that is not there.
    """
    bounds = [data.max_tokens]
    if data.max_documents and data.packing == "truncate":
        bounds.append(data.max_documents * data.context_length)
    if data.source == EMBEDDED:
        bounds.append(EMBEDDED_TOKENS)
    elif not may_stop_early(data):
        files = source_files(data)
        size = sum(path.stat().st_size * COMPRESSED.get(path.suffix.lower(), 1) for path in files)
        bounds.append(size // BYTES_PER_TOKEN)
    return min((bound for bound in bounds if bound is not None), default=None)
