"""Where things land (`TSAE_HOME`) and the variables that a `.env` file brings."""

from __future__ import annotations

import os
from pathlib import Path

from tsae.errors import TsaeError


def load_dotenv() -> None:
    """Read the nearest `.env` (working directory or a parent); variables already set win.

    Must run before huggingface_hub is imported: it reads HF_HOME at import time.
    """
    import dotenv

    path = dotenv.find_dotenv(usecwd=True)
    try:
        dotenv.load_dotenv(path, override=False)
    except UnicodeDecodeError:
        raise TsaeError(f"{path}: not UTF-8 text; a .env file holds lines such as HF_HOME=/folder") from None


def home() -> Path:
    """The folder under which stores/, checkpoints/ and sweeps/ live: `TSAE_HOME`, or `./runs`."""
    return Path(os.environ.get("TSAE_HOME") or "runs").expanduser().absolute()


def available_cores() -> int:
    """CPU cores this process may use, as the scheduler or the container set them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_rank() -> int:
    """Which of the processes started together this one is (torchrun's RANK); 0 if it is alone."""
    return int(os.environ.get("RANK") or 0) if process_count() > 1 else 0


def process_count() -> int:
    """How many processes were started together (torchrun's WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE") or 1)
