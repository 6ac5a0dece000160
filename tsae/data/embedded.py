"""The embedded corpus: English documentation of the installed dependencies and of the standard library.

Only packages that tsae depends on are read, so that the content follows from their versions alone; one document is
one source file. The result is kept under TSAE_HOME/corpus, named after those versions.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tsae.config import schema
from tsae.data import prose
from tsae.runtime.environment import available_cores, home
from tsae.runtime.errors import TsaeError
from tsae.runtime.files import write_atomically
from tsae.runtime.progress import Progress

EXTRACTOR_VERSION = 3
MIN_DOCUMENT = 200  # characters
MAX_DOCUMENT = 20_000  # characters; a longer file becomes several documents
MAX_SOURCE = 16_000_000  # bytes of source files per topic; bounds the time and the share of the two largest
FILES_PER_TASK = 32

PACKAGES: dict[str, tuple[str, ...]] = {
    "transformers": ("transformers",),
    "torch": ("torch",),
    "sympy": ("sympy", "mpmath"),
    "scipy": ("scipy",),
    "numpy": ("numpy",),
    "sklearn": ("scikit-learn",),
    "pandas": ("pandas",),
    "networkx": ("networkx",),
    "matplotlib": ("matplotlib",),
    "hub": ("huggingface_hub", "accelerate"),
    "storage": ("datasets", "zarr", "fsspec", "pyarrow"),
}
"""Topic → distributions whose files it is made of."""

STANDARD_LIBRARY: dict[str, str] = {
    "stdlib-language": """abc ast bdb bisect builtins cmd code codeop collections copy copyreg dataclasses dis doctest enum
        functools heapq importlib inspect keyword linecache opcode operator pdb pickle pickletools pkgutil pprint pydoc
        pydoc_data queue random reprlib runpy statistics decimal _pydecimal fractions numbers symtable token tokenize
        trace traceback types typing unittest warnings weakref zipimport""",
    "stdlib-network": """asyncio base64 calendar cgitb email ftplib gettext html http imaplib ipaddress locale mailbox
        mimetypes netrc nntplib poplib quopri smtplib socket socketserver ssl telnetlib urllib uuid webbrowser wsgiref
        xml xmlrpc""",
    "stdlib-system": """argparse codecs compileall concurrent configparser contextlib csv ctypes datetime _pydatetime
        difflib encodings filecmp fileinput fnmatch getopt getpass glob gzip hashlib io _pyio json logging lzma
        multiprocessing optparse os pathlib platform posixpath profile pstats pty re sched secrets selectors shelve
        shlex shutil signal site sqlite3 string stat subprocess sysconfig tarfile tempfile textwrap threading timeit
        tomllib tracemalloc venv zipfile zoneinfo""",
}
"""Topic → modules and packages of the standard library; those that a Python version lacks are passed over."""

TOPICS: tuple[str, ...] = (*PACKAGES, *STANDARD_LIBRARY)


class Source(NamedTuple):
    """One file of a topic; `name` is its place in the corpus' order and does not depend on the installation's path."""

    topic: str
    name: str
    path: str
    size: int


def corpus_fingerprint() -> str:
    """Hash of the versions that decide the content: packages, Python, and this extractor."""
    versions = {name: _version(name) for names in PACKAGES.values() for name in names}
    return schema.stable_hash([EXTRACTOR_VERSION, platform.python_version(), versions])


@functools.cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def read_corpus() -> Iterator[tuple[str, str]]:
    """(topic, text) of every document, in a fixed order; extracted on the first call, then read from the cache."""
    import zstandard

    path = home() / "corpus" / f"{corpus_fingerprint()}.jsonl.zst"
    if not path.exists():
        _write_corpus(path)
    try:
        lines = zstandard.ZstdDecompressor().decompress(path.read_bytes()).decode().splitlines()
        records = [json.loads(line) for line in lines]
    except (zstandard.ZstdError, ValueError):
        raise TsaeError(f"{path}: the cached corpus is damaged; delete the file, and it is extracted again") from None
    for record in records:
        yield record["label"], record["text"]


def _write_corpus(path: Path) -> None:
    import zstandard

    lines = [json.dumps({"label": topic, "text": text}) + "\n" for topic, text in extract()]
    packed = zstandard.ZstdCompressor(level=6, write_checksum=True).compress("".join(lines).encode())
    write_atomically(path, lambda stream: stream.write(packed))


def extract() -> Iterator[tuple[str, str]]:
    """(topic, text) of every document, read afresh; a paragraph that occurs in several places stays in the first."""
    sources = _capped(_sources())
    readmes = [(topic, list(prose.paragraphs(_readme(name)))) for topic, names in PACKAGES.items() for name in names]
    seen: set[bytes] = set()
    for topic, found in readmes:
        yield from _documents(topic, found, seen)
    progress = Progress("embedded corpus", len(sources), "files")
    tasks = [sources[start : start + FILES_PER_TASK] for start in range(0, len(sources), FILES_PER_TASK)]
    # Forked workers only run regular expressions; spawned ones would import the caller's script again.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    with ProcessPoolExecutor(min(available_cores(), 8), mp_context=context) as pool:
        done = 0
        for task, results in zip(tasks, pool.map(_read_sources, tasks), strict=True):
            for source, found in zip(task, results, strict=True):
                yield from _documents(source.topic, found, seen)
            done += len(task)
            progress.update(done)


def _documents(topic: str, paragraphs: list[str], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """The new paragraphs of one file as one document, or several if they are many."""
    fresh: list[str] = []
    size = 0
    for paragraph in paragraphs:
        digest = hashlib.blake2b(paragraph.encode(), digest_size=12).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if size + len(paragraph) > MAX_DOCUMENT:
            yield topic, "\n\n".join(fresh)
            fresh, size = [], 0
        fresh.append(paragraph)
        size += len(paragraph)
    if size >= MIN_DOCUMENT:
        yield topic, "\n\n".join(fresh)


def _sources() -> Iterator[Source]:
    for topic, names in PACKAGES.items():
        for name in names:
            module = {"scikit-learn": "sklearn"}.get(name, name)
            spec = importlib.util.find_spec(module)
            for folder in (spec.submodule_search_locations or []) if spec else []:
                yield from _files(topic, module, Path(folder))
    library = Path(sysconfig.get_path("stdlib"))
    for topic, modules in STANDARD_LIBRARY.items():
        for module in modules.split():
            path = library / f"{module}.py"
            if path.is_file():
                yield Source(topic, f"{module}.py", str(path), path.stat().st_size)
            elif path.with_suffix("").is_dir():
                yield from _files(topic, module, path.with_suffix(""))


def _capped(sources: Iterable[Source]) -> list[Source]:
    """At most `MAX_SOURCE` bytes of each topic, drawn by the hash of the name; in the order of topics and names."""
    kept, sizes = [], dict.fromkeys(TOPICS, 0)
    for source in sorted(sources, key=lambda source: hashlib.sha256(source.name.encode()).digest()):
        sizes[source.topic] += source.size
        if sizes[source.topic] <= MAX_SOURCE:
            kept.append(source)
    return sorted(kept)


def _files(topic: str, module: str, folder: Path) -> Iterator[Source]:
    for path in folder.rglob("*"):
        within = path.relative_to(folder)
        if path.suffix in (".py", ".rst", ".md") and not {"tests", "test"} & set(within.parts):
            yield Source(topic, f"{module}/{within.as_posix()}", str(path), path.stat().st_size)


def _read_sources(sources: list[Source]) -> list[list[str]]:
    """The paragraphs of each file, in the order of the file."""
    return [list(_read_source(Path(source.path))) for source in sources]


def _read_source(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    for part in prose.texts(text) if path.suffix == ".py" else [text]:
        yield from prose.paragraphs(part)


def _readme(distribution: str) -> str:
    try:
        metadata = importlib.metadata.distribution(distribution).read_text("METADATA") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""
    return metadata.partition("\n\n")[2]
