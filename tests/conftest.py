"""What every test may use: a tiny language model with its tokenizer, and text to harvest from.

One thread a process, since tests share the machine with each other.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; this one is told below
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fcntl
import json
import random
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

# A shell's background job ignores Ctrl-C, and one of nohup the end of its terminal; so would every launcher that a test
# starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


TESTS = Path(__file__).parent
LABS = ("slurm", "gridengine", "containers")
LONG = ("system", "acceptance", "docs", "packaging", "upgrade")
"""Folders of files that take minutes."""


def place(path: Path) -> tuple[str, ...]:
    """The folders of a test, and its file."""
    return path.relative_to(TESTS).parts


def in_lab(path: Path) -> bool:
    return place(path)[:2] in [("system", lab) for lab in LABS]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the labs, whose tests take longest and stay in one process, then with what takes minutes."""
    items.sort(key=lambda item: (not in_lab(item.path), place(item.path)[0] not in LONG))


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One process more than there are cores where a lab was promised: its tests wait for their jobs, and use no core."""
    cores = yield
    return cores + any(map(promised, LABS))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist, all is one process
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `-n` keeps in one process: a file's tests share its fixtures, and a folder of tests/system what it has started.

    The containers are among Slurm's, since they use the one of this machine, too.
    xdist's own marks for groups do nothing under pytest 9.2 (pytest-xdist issue 1386).
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            *folders, _ = place(config.rootpath / path)
            if folders[:1] != ["system"] or len(folders) < 2:
                return path
            return "slurm" if folders[1] == "containers" else folders[1]

    config.option.loadscopereorder = False
    return Scheduling(config, log)


Require = Callable[[str, bool, str], None]


def promised(tool: str) -> bool:
    """Whether TSAE_REQUIRE promises `tool`; a test may then install what is missing of it."""
    return tool in os.environ.get("TSAE_REQUIRE", "").split(",")


@pytest.fixture(scope="session")
def installs() -> Callable[[str], bool]:
    """Whether tests may install a tool on this machine: only where TSAE_REQUIRE promises it."""
    return promised


@pytest.fixture(scope="session")
def require() -> Require:
    """`require(tool, present, how)` skips a test whose tool is not here, saying how it comes.

    Where TSAE_REQUIRE promises the tool, as CI does, the test fails instead.
    """

    def check(tool: str, present: bool, how: str) -> None:
        if not present and promised(tool):
            pytest.fail(f"TSAE_REQUIRE names {tool}, and it is not here: {how}")
        if not present:
            pytest.skip(f"needs {tool}: {how}")

    return check


WORDS = [a + b for a in ("ka", "lo", "mi", "ru", "se", "ta") for b in ("ba", "do", "fe", "gi", "nu")]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the hub's format: random GPT-NeoX of width 32 with 3 blocks, one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny-neox"
    GPTNeoXForCausalLM(shape).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 20 to 60 words."""
    generator, path = random.Random(0), tmp_path_factory.mktemp("text") / "documents.jsonl"
    documents = [" ".join(generator.choices(WORDS, k=generator.randint(20, 60))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `corpus` of a TSAE_HOME, with the embedded text: half a minute's work, which one process does for all."""
    from tsae.data.embedded import read_corpus

    root = tmp_path_factory.getbasetemp()
    home = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "corpus-home"
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("TSAE_HOME", str(home))
        next(read_corpus())
    return home / "corpus"
