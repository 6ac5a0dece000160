"""`tsae selftest`: whether this installation can work here, one line for each thing that it needs. Needs no network."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import tsae
from tsae.evaluation.measures import FVE
from tsae.runtime import files
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError

MINIMUM_SHARED_MEMORY = 32  # MiB; several GPUs exchange through it, and need more
MINIMUM_SHARED_MEMORY_GPUS = 256
MINIMUM_FVE = 0.3  # fraction of variance explained after a few steps; without training it is below zero
TEXT_MODULES = ("argparse", "collections", "inspect", "logging", "subprocess", "tarfile", "tempfile", "typing")
EXTRAS = frozenset({"triton", "tensorboard", "wandb", "sae_lens"})
# What no module of the package loads before it is needed.
ON_DEMAND = (
    "datasets",
    "dotenv",
    "huggingface_hub",
    "matplotlib.pyplot",
    "nnsight",
    "sklearn.linear_model",
    "submitit",
    "transformers",
    "zarr",
    "zstandard",
)
SHARED_MEMORY = Path("/dev/shm")
GPU_DEVICE = Path("/dev/nvidiactl")


def selftest() -> int:
    """Make every check and print its line; 2 if one failed, else 0."""
    failed = 0
    for name, check in CHECKS.items():
        began = time.monotonic()
        try:
            line, verdict = check(), "ok"
        # Whatever goes wrong is a finding, and the checks after it are still worth making.
        except Exception as error:
            kind = "" if isinstance(error, TsaeError) else f"{type(error).__name__}: "
            line, verdict = kind + " ".join(str(error).split()), "FAILED"
            failed += 1
        print(f"{verdict:<7} {name + ':':<15} {line} ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"{failed} of {len(CHECKS)} checks failed" if failed else f"all {len(CHECKS)} checks passed")
    return 2 if failed else 0


def imports() -> str:
    """Load every module of the package, and the dependencies that it loads only when they are needed."""
    names = [module.name for module in pkgutil.walk_packages(tsae.__path__, "tsae.") if module.name != "tsae.__main__"]
    without = set()
    for name in (*names, *ON_DEMAND):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in EXTRAS:
                raise TsaeError(f"{name} cannot be loaded: {error}; install tsae again") from None
            without.add(error.name.partition(".")[0])
    absent = f"; without {', '.join(sorted(without))}" if without else ""
    return f"{len(names)} modules of {Path(tsae.__file__).parent}{absent}"


def versions() -> str:
    """Compare what is installed with constraints.txt; a build's local part (`+cpu`) does not count."""
    lines = (line.partition("#")[0].strip() for line in _constraints().read_text(encoding="utf-8").splitlines())
    pins = dict(line.split("==", 1) for line in lines if "==" in line)
    installed = {}
    for name in pins:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    wrong = [
        f"{name} {version} instead of {pins[name]}"
        for name, version in installed.items()
        if version.partition("+")[0] != pins[name]
    ]
    if wrong:
        raise TsaeError(f"{', '.join(wrong)}; `pip install -c constraints.txt` brings the tested versions")
    tsae_version = installed.get("tsae", "of a checkout, not installed")
    return f"{len(installed)} packages as pinned, torch {installed['torch']}, tsae {tsae_version}"


def _constraints() -> Path:
    """constraints.txt as installed with the package, or beside it in a checkout."""
    installed = [Path(str(file.locate())) for file in metadata.files("tsae") or () if file.name == "constraints.txt"]
    for path in (*installed, Path(tsae.__file__).parents[1] / "constraints.txt"):
        if path.is_file():
            return path
    raise TsaeError("constraints.txt is neither installed with tsae nor beside it; install tsae again")


def pipeline() -> str:
    """Harvest, train and evaluate a tiny dictionary on the shipped language model, in a temporary folder."""
    from tsae import stages
    from tsae.config import run as configuration
    from tsae.data import prose

    with tempfile.TemporaryDirectory(prefix="tsae-selftest-") as folder, contextlib.redirect_stderr(io.StringIO()):
        text = Path(folder) / "text.jsonl"
        # English that every Python brings along: documentation of its standard library.
        sources = [inspect.getsource(importlib.import_module(name)) for name in TEXT_MODULES]
        paragraphs = [part for source in sources for found in prose.texts(source) for part in prose.paragraphs(found)]
        text.write_text("".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs))
        settings = {
            "model": {"name": "embedded", "layer": 2},
            "data": {"source": str(text), "context_length": 32, "min_length": 8, "max_tokens": 12_000, "holdout": 0.1},
            "store": {"path": str(Path(folder) / "store")},
            "sae": {"dict_size": 256, "k": 8},
            "training": {"steps": 60, "batch_size": 256, "lr": 5e-3, "warmup_steps": 5, "threshold_start_step": 10},
            "evaluation": {"sequences": 16, "loss_sequences": 4},
        }
        config = configuration.from_mapping(settings, "selftest")
        stages.harvest_stage(config)
        stages.train_stage(config, Path(folder), "run")
        run = stages.evaluate_stage(config, Path(folder), "run")
        results = json.loads((run / "eval_results.json").read_text())
    fve = float(results[FVE])
    if not fve > MINIMUM_FVE:
        raise TsaeError(f"a tiny training explains {fve:.2f} of the variance; more than {MINIMUM_FVE} is expected")
    return f"harvest, train, evaluate; {fve:.2f} of the variance explained"


def gpus() -> str:
    """Multiply on every visible GPU and compare with the CPU."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda and GPU_DEVICE.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise TsaeError(
                f"torch {torch.__version__} sees no GPU though there is one: start the container with --nv (Apptainer) "
                f"or --gpus all (Docker); the driver must serve CUDA {torch.version.cuda}"
            )
        return "none visible; the CPU is used"
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = []
    for index in range(torch.cuda.device_count()):
        on_gpu = matrix.to(f"cuda:{index}")
        if not torch.allclose((on_gpu @ on_gpu).cpu(), matrix @ matrix):
            raise TsaeError(f"GPU {index} ({torch.cuda.get_device_name(index)}) multiplies wrongly")
        names.append(torch.cuda.get_device_name(index))
    return f"{len(names)}: {', '.join(sorted(set(names)))}; CUDA {torch.version.cuda}"


def nccl() -> str:
    """Add up over all visible GPUs, one process each."""
    import torch

    if not torch.cuda.is_available():
        return "not needed without a GPU"
    count = torch.cuda.device_count()
    add_up("nccl", count)
    return f"{count} {'processes' if count > 1 else 'process'}, version {'.'.join(map(str, torch.cuda.nccl.version()))}"


def add_up(backend: str, processes: int) -> None:
    """Let `processes` new processes add up their ranks over `backend`. Raises what one of them raised."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory(prefix="tsae-selftest-") as folder:
        torch.multiprocessing.spawn(_add_ranks, (backend, processes, f"file://{folder}/meeting"), processes)


def _add_ranks(rank: int, backend: str, processes: int, meeting: str) -> None:
    import torch

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=processes)
    total = torch.tensor([float(rank + 1)], device=device)
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    expected = processes * (processes + 1) / 2
    if total.item() != expected:
        raise TsaeError(f"{backend}: process {rank} received {total.item()}; {expected} is right")


def writable_home() -> str:
    """Write a file under TSAE_HOME as every stage does, and remove it."""
    folder = home()
    probe = folder / f".selftest-{os.getpid()}"
    try:
        files.write_atomically(probe, lambda stream: stream.write(b"tsae"))
        probe.unlink()
    except OSError as error:
        raise TsaeError(
            f"{folder}: user {os.getuid()} cannot write there ({error.strerror}); set TSAE_HOME to a folder of your "
            "own, or mount one"
        ) from None
    return f"{folder} is writable, {shutil.disk_usage(folder).free / 1e9:.0f} GB free"


def shared_memory() -> str:
    """See that processes of this machine can exchange data, and have room for it."""
    import torch

    several = torch.cuda.is_available() and torch.cuda.device_count() > 1
    needed = MINIMUM_SHARED_MEMORY_GPUS if several else MINIMUM_SHARED_MEMORY
    if not SHARED_MEMORY.is_dir():
        raise TsaeError(f"{SHARED_MEMORY} is missing; mount a tmpfs there")
    free = shutil.disk_usage(SHARED_MEMORY).free // 2**20
    if free < needed:
        raise TsaeError(f"{SHARED_MEMORY} has {free} MiB free, {needed} are needed; --shm-size=1g (Docker) gives more")
    try:
        with tempfile.TemporaryFile(dir=SHARED_MEMORY) as probe:
            probe.write(b"tsae")
    except OSError as error:
        raise TsaeError(f"{SHARED_MEMORY}: user {os.getuid()} cannot write there ({error.strerror})") from None
    return f"{free} MiB free in {SHARED_MEMORY}"


CHECKS: dict[str, Callable[[], str]] = {
    "imports": imports,
    "versions": versions,
    "pipeline": pipeline,
    "GPUs": gpus,
    "NCCL": nccl,
    "TSAE_HOME": writable_home,
    "shared memory": shared_memory,
}
