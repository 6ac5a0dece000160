"""The layout of an activation store: where everything is, and what its attributes mean.

    <store>/
        zarr.json                   group; attributes: settings, model, geometry, digests, statistics, manifest, complete
        activations/                [N, L, D]; bfloat16 is kept as uint16 (attribute `dtype`)
            zarr.json  c/<k>/0/0    one file per shard
        checksums/                  [chunks] crc32c of each chunk of the activations
            shards/<k>.json         marker of a finished shard: size, checksums, partial statistics
        tokens/ document/           [N, L]; document is -1 at padding, BOS and other special tokens
        lengths/                    [N] real tokens of each sequence
        norms/                      [N, L] norm of each position as stored, a chunk for each shard
        label/                      [documents] index into the attribute `label_names`, -1: none
        truth_*/                    of a synthetic world: the true features' directions, kinds, held-out activations
        progress.json               only while a harvest runs

Shard `k` holds sequences `k·S` to `(k+1)·S`; the last `heldout` sequences belong to evaluation. `complete` turns true
last of all. Nothing else in the package builds a path into a store.

Of a rolling store (attribute `rolling`) the shards with held-out sequences are kept; those of the training part come and
go (see `tsae.store.window`), and it is complete without them. Its statistics are of the first `sample` sequences, whose
norms and markers are kept too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.runtime import files, metadata
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError
from tsae.runtime.metadata import COUNT, NATURAL
from tsae.runtime.rows import Rows, RowsOnDisk
from tsae.store.geometry import ITEMSIZE, Geometry, crc32c

FORMAT = "tsae-activations"
VERSION = 1
SIBLINGS = {
    "tokens": ("sequence", "position"),
    "lengths": ("sequence",),
    "document": ("sequence", "position"),
    "label": ("document",),
}
"""Arrays beside the activations, with the names of their dimensions."""

ON_DISK = ("tokens", "document")
"""Those that are as long as the text: kept as plain numbers and a checksum for each chunk, and never whole in memory."""

NORMS = "norms"
"""The array of norms, which can be made again (see `tsae.store.norms`)."""

EXTRAS = {
    "truth_directions": ("feature", "dimension"),
    "truth_group": ("feature",),
    "truth_features": ("heldout_sequence", "position", "feature"),
}
"""Arrays that only some stores have."""


def content_hash(config: RunConfig) -> str:
    """Hash of all that decides the content of the store of `config`: settings, text and weights."""
    return _hash_of(config, sources(config))


def sources(config: RunConfig) -> dict[str, str]:
    """What the store of `config` is made from, beside settings: the text's content and the language model's.

    And by what its held-out documents are chosen.
    """
    if config.is_synthetic:
        return {}
    if config.is_stored:
        layout = StoreLayout(store_path(config))
        if not layout.exists():
            raise TsaeError(f"{layout.path}: no activation store is here; `tsae store import` makes one of arrays")
        if not layout.is_whole():
            raise TsaeError(f"{layout.path}: the store is not finished; give the command again that began it")
        return {"activations": schema.stable_hash([layout.identity, layout.attributes["manifest"]["checksums"]])}
    from tsae.data.contexts import HELD_OUT_BY
    from tsae.data.documents import fingerprint
    from tsae.lm.source import weights_fingerprint

    made_of = {"text": fingerprint(config.data), "weights": weights_fingerprint(config.model)}
    return {**made_of, "held_out_by": HELD_OUT_BY}


def hash_before(config: RunConfig) -> str:
    """The hash that stores were named and known by before contents decided it."""
    if config.without_text:
        return content_hash(config)
    from tsae.data.documents import fingerprint_before as text_before
    from tsae.lm.source import fingerprint_before as weights_before

    return _hash_of(config, {"text": text_before(config.data), "weights": weights_before(config.model)})


def _hash_of(config: RunConfig, made_of: dict[str, str]) -> str:
    settings = {"version": VERSION, "settings": configuration.store_settings(config), **made_of}
    if config.is_synthetic:
        from tsae.data import synthetic

        settings["world"] = synthetic.VERSION
    return schema.stable_hash(settings)


def store_path(config: RunConfig) -> Path:
    """Where the store of `config` is: `store.path`, or TSAE_HOME/stores/<model>-<hook>-<hash>."""
    if config.store.path is not None:
        return Path(config.store.path).expanduser().absolute()
    model = Path(config.model.name.rstrip("/")).name
    hook = config.model.hook_point or f"layer{config.model.layer}"
    made_of = f"synthetic-{config.synthetic.preset}" if config.is_synthetic else f"{model}-{hook}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", made_of)
    path = home() / "stores" / f"{name[:80]}-{content_hash(config)}"
    if not path.exists():
        before = path.with_name(f"{name[:80]}-{hash_before(config)}")
        if before != path and before.exists() and _is_of(StoreLayout(before), config):
            return before
    return path


def _is_of(layout: StoreLayout, config: RunConfig) -> bool:
    """Whether a store was made from exactly this configuration, text and model.

    One from before contents were recorded knows names and sizes alone; it counts while no file is newer than it. A
    configuration that only names a store takes what is there.
    """
    if config.is_stored:
        return True
    recorded = layout.attributes.get("config_hash")
    if recorded == content_hash(config):
        return True
    if "sources" in layout.attributes or recorded != hash_before(config):
        return False
    return untouched_since(config, (layout.path / "tokens" / "zarr.json").stat().st_mtime)


def untouched_since(config: RunConfig, moment: float) -> bool:
    """Whether no local file of the text or the language model was changed after `moment` (seconds since 1970)."""
    from tsae.data.documents import source_files
    from tsae.lm.source import model_files

    return all(path.stat().st_mtime <= moment for path in (*source_files(config.data), *model_files(config.model)))


def is_harvested(config: RunConfig) -> bool:
    """Whether the store of exactly this configuration is here and whole; reads no activations."""
    layout = StoreLayout(store_path(config))
    return layout.exists() and _is_of(layout, config) and layout.is_whole()


MANIFEST = {"shards": COUNT, "bytes": COUNT, "checksums": str}
ATTRIBUTES = {
    "identity": str,
    "geometry": {
        **dict.fromkeys(("sequences", "context_length", "activation_dim", "chunk_sequences", "shard_sequences"), COUNT),
        "dtype": set(ITEMSIZE),
    },
    "heldout": NATURAL,
    "tokens": NATURAL,
    "label_names": [str],
    "digests": {str: str},
    "frames?": {str: str},
    "complete": bool,
    "contexts?": object,
    "config_hash?": str,
    "sources?": (None, {str: str}),
    "settings?": (None, dict),
    "model?": dict,
    "rolling?": {"sample": NATURAL},
}
MARKER = {
    **{"store": str, "shard": NATURAL, "sequences": COUNT, "bytes": COUNT, "checksums": str},
    "summary?": {"count": NATURAL, "total": str, "squares": str, "largest": str},
}
MEASURED = {**MARKER, "summary": MARKER["summary?"]}
REMEDY = "restore this file from a copy, or remove the store and harvest it again"

_attributes: dict[Path, tuple[tuple[int, int, int], dict[str, Any]]] = {}
"""Of this process: which file the attributes were read from last, and what it held."""


def of_complete(attributes: dict[str, Any]) -> dict[str, Any]:
    """The shape of what a complete store's attributes hold beside those of every store."""
    dim = attributes["geometry"]["activation_dim"]
    vectors = {"mean": [float, dim], "variance": [float, dim], "max_abs": [float, dim]}
    return {"statistics": {"count": NATURAL, **vectors, "mean_squared_norm": float}, "manifest": MANIFEST}


class StoreLayout:
    """Paths and small files of one store. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.activations = self.path / "activations"
        self.shards = self.activations / "c"
        self.progress = self.path / "progress.json"
        self._metadata = self.path / "zarr.json"

    def exists(self) -> bool:
        """Whether a store, complete or not, is here. Raises TsaeError if the folder holds something else."""
        if self._metadata.exists():
            return True
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise TsaeError(f"{self.path}: is not an activation store and not empty; choose another store.path")
        return False

    @property
    def attributes(self) -> dict[str, Any]:
        """The group's attributes as they are on disk now. Raises TsaeError if this is no store."""
        try:
            status = self._metadata.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise TsaeError(
                f"{self.path}: no activation store is here; `tsae harvest YAML` makes one (of a run: its trainer_0/resolved.yaml)"
            ) from None
        # Whoever changes attributes puts another file in the place of this one.
        file = (status.st_ino, status.st_size, status.st_mtime_ns)
        if _attributes.get(self._metadata, (None,))[0] != file:
            _attributes[self._metadata] = file, self._read_attributes()
        return _attributes[self._metadata][1]

    def _read_attributes(self) -> dict[str, Any]:
        where = str(self._metadata)
        found = metadata.read(self._metadata, {"attributes": dict}, REMEDY)["attributes"]
        if found.get("format") != FORMAT:
            raise TsaeError(f"{self.path}: is a zarr group but no activation store of tsae")
        if found.get("version") != VERSION:
            raise TsaeError(
                f"{self.path}: has store version {found.get('version')}, this tsae reads version {VERSION}; harvest it again"
            )
        found = metadata.require(found, ATTRIBUTES, where, REMEDY)
        return metadata.require(found, of_complete(found) if found["complete"] else dict, where, REMEDY)

    def set_attributes(self, **values: Any) -> None:
        """Change some of the group's attributes, atomically."""
        self.write_attributes({**self.attributes, **values})

    def write_attributes(self, attributes: dict[str, Any]) -> None:
        """Have these attributes and no others, atomically."""
        group = json.loads(self._metadata.read_text())
        files.write_json(self._metadata, {**group, "attributes": metadata.sealed(attributes)})

    @cached_property
    def identity(self) -> str:
        """Hash of what the store was prepared from; every marker carries it."""
        return str(self.attributes["identity"])

    @cached_property
    def geometry(self) -> Geometry:
        """Shape and cutting of the activations; fixed when the store is prepared."""
        return Geometry(**{field.name: self.attributes["geometry"][field.name] for field in fields(Geometry)})

    @cached_property
    def heldout(self) -> int:
        """How many of the last sequences belong to evaluation."""
        return int(self.attributes["heldout"])

    @cached_property
    def rolling(self) -> bool:
        """Whether shards of the training part come and go."""
        return "rolling" in self.attributes

    @cached_property
    def sample(self) -> int:
        """How many of the first sequences the statistics are of: all of the training part, unless the store is rolling."""
        return int(self.attributes["rolling"]["sample"]) if self.rolling else self.geometry.sequences - self.heldout

    @cached_property
    def kept(self) -> range:
        """The shards whose activations a complete store has."""
        train = self.geometry.sequences - self.heldout
        return range(train // self.geometry.shard_sequences if self.rolling else 0, self.geometry.shards)

    @cached_property
    def measured(self) -> tuple[int, ...]:
        """The shards whose norms and markers a complete store has."""
        first = -(-self.sample // self.geometry.shard_sequences)
        return tuple(sorted({*range(first), *self.kept}))

    @cached_property
    def measured_sequences(self) -> np.ndarray:
        """[n] the sequences of those shards: all, unless the store is rolling."""
        return np.concatenate([np.array(self.geometry.sequences_of(shard), np.int64) for shard in self.measured])

    def is_measured(self, shard: int) -> bool:
        """Whether a complete store has the norms and the marker of `shard`."""
        return shard in self.kept or shard * self.geometry.shard_sequences < self.sample

    def is_settled(self, shard: int) -> bool:
        """Whether a complete store would need nothing more of `shard`, which is one of the measured."""
        return self.is_written(shard) if shard in self.kept else self.read_marker(shard) is not None

    def shard(self, shard: int) -> Path:
        """The file of one shard."""
        return self.shards / str(shard) / "0" / "0"

    def marker(self, shard: int) -> Path:
        """The marker that says a shard is finished."""
        return self.path / "checksums" / "shards" / f"{shard:06d}.json"

    def check_frame(self, name: str) -> None:
        """Raise TsaeError unless the zarr.json of an array, which other programs read first, is what was written."""
        path = self.path / name / "zarr.json"
        recorded = self.attributes.get("frames", {}).get(name)
        if recorded is None:  # of an earlier version
            metadata.read(path, {"node_type": {"array"}}, REMEDY)
        elif not path.is_file() or file_hash(path) != recorded:
            raise TsaeError(f"{path}: missing or damaged; copy it from a store of the same shape, or harvest again")

    def array(self, name: str) -> np.ndarray:
        """One of the arrays beside the activations, whole. Raises TsaeError if it is damaged."""
        blocks: list[np.ndarray] = []
        found = self.check_array(name, lambda _, block: blocks.append(block))
        return np.concatenate(blocks) if blocks else np.zeros(found.shape, found.dtype)

    def check_array(self, name: str, each: Callable[[slice, np.ndarray], object] = lambda _, __: None) -> Any:
        """The zarr array of that name, which has been read and is as it was harvested; `each` is given its blocks.

        Raises TsaeError if it is damaged.
        """
        import zarr

        try:
            found = zarr.open_array(self.path / name, mode="r")
            measured = name == NORMS and self.rolling
            rows: Any = found.oindex[self.measured_sequences] if measured else found
            whole = digest(rows, found.chunks[0], each) == self.attributes["digests"][name]
        except (OSError, ValueError, RuntimeError) as error:
            raise TsaeError(f"{self.path / name}: has changed since the harvest ({error}); {remedy_of(name)}") from None
        if not whole:
            raise TsaeError(f"{self.path / name}: has changed since the harvest; {remedy_of(name)}")
        return found

    def _as_long_as_the_text(self, name: str) -> Rows:
        """One of the arrays [N, L] int32 of `ON_DISK`; whole in memory where an earlier version compressed it."""
        found = self.check_array(name)
        if [type(codec).__name__ for codec in found.compressors] != ["Crc32cCodec"]:
            return self.array(name)
        folder = self.path / name / "c"
        return RowsOnDisk(
            found.shape, "<i4", lambda file: folder / str(file) / "0", found.chunks[0], remedy=remedy_of(name)
        )

    @cached_property
    def tokens(self) -> Rows:
        """[N, L] int32."""
        return self._as_long_as_the_text("tokens")

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] int32."""
        return self.array("lengths")

    @cached_property
    def document(self) -> Rows:
        """[N, L] int32."""
        return self._as_long_as_the_text("document")

    def read_checksums(self) -> np.ndarray:
        """[chunks] uint32: the crc32c of every chunk of a complete store. Raises TsaeError if it is damaged."""
        path = self.path / "checksums" / "c" / "0"
        data = path.read_bytes() if path.exists() else b""
        checksums = np.frombuffer(data[: len(data) // 4 * 4], "<u4")[: self.geometry.chunks]
        if digest(checksums) != self.attributes["manifest"]["checksums"]:
            raise TsaeError(f"{path}: is damaged; run the same harvest again")
        return checksums

    def write_checksums(self, checksums: np.ndarray) -> None:
        """Write the array `checksums`: one chunk of plain numbers and its own crc32c."""
        data = checksums.astype("<u4").tobytes()
        files.write_atomically(self.path / "checksums" / "c" / "0", lambda stream: stream.write(data + crc32c(data)))

    def complaint(self, shard: int, problem: str) -> str:
        """One line about a damaged shard: which, what is wrong, what to do."""
        remedy = (
            "remove that file and run the same harvest again"
            if self.is_written(shard)
            else "run the same harvest again"
        )
        return f"{self.path}: shard {shard} ({self.shard(shard).relative_to(self.path)}) {problem}; {remedy}"

    def read_marker(self, shard: int) -> dict[str, Any] | None:
        """The marker of a shard of this store, or None while there is none."""
        # Markers are written atomically, so a broken one was damaged later: the shard is written again.
        marker = metadata.whole(self.marker(shard), MEASURED if self.is_measured(shard) else MARKER)
        return marker if marker.get("store") == self.identity else None

    def is_written(self, shard: int) -> bool:
        """Whether a shard is finished: marked, and its file has the right size."""
        return self.size_of(shard) == self.geometry.shard_bytes(shard) and self.read_marker(shard) is not None

    def size_of(self, shard: int) -> int | None:
        """Bytes of the file of a shard, None if it is missing."""
        path = self.shard(shard)
        return path.stat().st_size if path.exists() else None

    def is_whole(self) -> bool:
        """Whether the store is complete, with all its shards there and the checksums sound; reads no activations."""
        if not self.attributes["complete"]:
            return False
        try:
            self.read_checksums()
        except TsaeError:
            return False
        return all(map(self.is_settled, self.measured))

    def require(self, config: RunConfig) -> None:
        """Raise TsaeError, naming a difference, if the store was made from another configuration."""
        if _is_of(self, config):
            from tsae.lm.source import check_tokens

            check_tokens(config.model, config.data.exclude_tokens, self.attributes["model"].get("vocabulary"))
            return
        different = schema.differences(self.attributes.get("settings") or {}, configuration.store_settings(config))
        raise TsaeError(
            f"{self.path}: the store was harvested with another configuration "
            f"({different or changed(self.attributes.get('sources'), config)}); "
            "choose another store.path or remove the folder"
        )


def remedy_of(name: str) -> str:
    """What mends an array beside the activations."""
    made_again = "remove this folder, and it is made from the activations when it is needed"
    return made_again if name == NORMS else "remove the store and harvest again"


def changed(recorded: dict[str, str] | None, config: RunConfig) -> str:
    """In words, what has another content now than `recorded` says (what `sources` gave; None if it was not recorded)."""
    now, names = (
        sources(config),
        {"text": f"data.source: {config.data.source}", "weights": f"model.name: {config.model.name}"}
        if not config.is_stored
        else {"activations": f"store.path: {config.store.path}"},
    )
    if recorded is None:
        return f"its text or its language model has changed since ({' or '.join(names.values())})"
    different = [name for key, name in names.items() if recorded.get(key) != now.get(key)]
    return f"{' and '.join(different)} has another content now" if different else "made by another version of tsae"


def chunk_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How an array beside the activations is cut: rows of 4 MB or, of those that stay on disk, 16 MB and at most 256 files."""
    size = math.prod(shape[1:])
    most = max(2**22 // size, -(-shape[0] // 256)) if name in ON_DISK else 2**20 // size
    return (max(1, min(shape[0], most)), *shape[1:])


def digest(
    rows: Rows, step: int | None = None, each: Callable[[slice, np.ndarray], object] = lambda _, __: None
) -> str:
    """sha256 of an array's type, shape and content, read `step` rows at a time; `each` is given what was read."""
    hasher = hashlib.sha256(f"{rows.dtype.str}{rows.shape}".encode())
    step = step or rows.shape[0] or 1
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        block = np.ascontiguousarray(rows[part])
        hasher.update(block.data)
        each(part, block)
    return hasher.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encode(array: np.ndarray, dtype: str) -> str:
    """A small array as base64 text."""
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


def decode(text: str, dtype: str) -> np.ndarray:
    """The array that `encode` wrote, one-dimensional."""
    return np.frombuffer(base64.b64decode(text), dtype)
