"""How an array of activations is cut into chunks and shards, and where each byte of a shard lies.

A chunk is some whole sequences followed by their crc32c; a shard is the chunks of consecutive sequences followed by
zarr's shard index (offset and size of each chunk, then the index's own crc32c). All chunks have the same size, so
every offset is arithmetic.

An example: 1,000 sequences of 128 positions and 512 dimensions in bfloat16, so 131,072 bytes each and 131 MB in all.
    chunk    2 sequences reach 256 KiB: 262,144 bytes and 4 of checksum, a stride of 262,148; there are 500 chunks
    shard    a sixteenth of all is 8.19 MB, room for 31 chunks: 17 shards, evened out to 30 chunks (60 sequences) each
    index    30 entries of 16 bytes and a checksum, 484 bytes; a full shard's file has 30 · 262,148 + 484 = 7,864,924
    last     shard 16 has the 20 chunks that are left, and still an index of 30, whose last 10 entries say `ABSENT`
Sequence 75 is the second one of chunk 37, which is number 7 in shard 1: its bytes begin at 7 · 262,148 + 131,072.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
SMALLEST_CHUNK = 256 * 1024
SMALLEST_SHARD = 4_000_000
USUAL_SHARDS = 16
BLOCK_BYTES = 2_000_000
FEWEST_BLOCKS = 64
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
ABSENT = 2**64 - 1  # zarr's mark of a chunk that is not in its shard


@dataclass(frozen=True)
class Geometry:
    """Shape of the activations and of their cutting: N sequences, L positions, D activation_dim."""

    sequences: int
    context_length: int
    activation_dim: int
    dtype: str
    chunk_sequences: int
    shard_sequences: int

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence on disk."""
        return self.context_length * self.activation_dim * ITEMSIZE[self.dtype]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk without its checksum."""
        return self.chunk_sequences * self.sequence_bytes

    @property
    def stride(self) -> int:
        """Bytes from one chunk of a shard to the next."""
        return self.chunk_bytes + CRC_BYTES

    @property
    def chunks(self) -> int:
        """Chunks that hold data; the last may be padded."""
        return -(-self.sequences // self.chunk_sequences)

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a full shard."""
        return self.shard_sequences // self.chunk_sequences

    @property
    def shards(self) -> int:
        """Number of shards; the last may hold fewer chunks."""
        return -(-self.chunks // self.chunks_per_shard)

    def shard_of(self, chunk: int) -> int:
        """The shard that holds `chunk`."""
        return chunk // self.chunks_per_shard

    def chunks_of(self, shard: int) -> range:
        """The chunks with data in `shard`."""
        first = shard * self.chunks_per_shard
        return range(first, min(first + self.chunks_per_shard, self.chunks))

    def sequences_of(self, shard: int) -> range:
        """The sequences in `shard`."""
        first = shard * self.shard_sequences
        return range(first, min(first + self.shard_sequences, self.sequences))

    def shard_bytes(self, shard: int) -> int:
        """Size of the whole file of `shard`."""
        return len(self.chunks_of(shard)) * self.stride + self.index_bytes

    @property
    def index_bytes(self) -> int:
        """Size of the index at the end of a shard, with its checksum."""
        return self.chunks_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES

    def index(self, shard: int) -> bytes:
        """The index that must stand at the end of the file of `shard`."""
        entries = np.full((self.chunks_per_shard, 2), ABSENT, dtype="<u8")
        present = len(self.chunks_of(shard))
        entries[:present, 0] = np.arange(present, dtype=np.uint64) * np.uint64(self.stride)
        entries[:present, 1] = self.stride
        return entries.tobytes() + crc32c(entries)


def block_sequences(geometry: Geometry, train: int) -> int:
    """Sequences of a block, the unit in which `train` sequences are put into a random order: whole chunks, about 2 MB,
    but no more than leaves a small store 64 blocks. A shard of a rolling store is one block."""
    chunk = geometry.chunk_sequences
    wanted = min(BLOCK_BYTES // geometry.chunk_bytes, train // (FEWEST_BLOCKS * chunk))
    return max(1, wanted) * chunk


def crc32c(buffer: bytes | np.ndarray) -> bytes:
    """The four little-endian bytes of the crc32c of a contiguous buffer."""
    import google_crc32c

    return int(google_crc32c.value(buffer)).to_bytes(CRC_BYTES, "little")


def choose(sequences: int, context_length: int, activation_dim: int, dtype: str, shard_mb: int) -> Geometry:
    """Chunks of at least 256 KiB and less than twice that, cut so that little padding is left; shards up to `shard_mb`.

    Large enough chunks keep checksums and index under 0.01 % of the bytes. A small store is cut into about 16 shards
    of at least 4 MB, so that a killed harvest loses little and several tasks can share it.
    """
    sequence_bytes = context_length * activation_dim * ITEMSIZE[dtype]
    fewest = min(math.ceil(SMALLEST_CHUNK / sequence_bytes), sequences)
    per_chunk = min(range(fewest, 2 * fewest), key=lambda count: (-sequences % count, count))
    chunks = -(-sequences // per_chunk)
    target = min(shard_mb * 1_000_000, max(sequences * sequence_bytes // USUAL_SHARDS, SMALLEST_SHARD))
    shards = -(-chunks // max(1, target // (per_chunk * sequence_bytes)))
    per_shard = -(-chunks // shards) * per_chunk
    return Geometry(sequences, context_length, activation_dim, dtype, per_chunk, per_shard)
