"""The options of `tsae bench` and what it does, in order: rates, the step, growth; then JSON and a figure."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae.bench.shape import DTYPES, PRESETS, Shape, is_paired
from tsae.runtime import metadata
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError, suggestion

if TYPE_CHECKING:
    from tsae.config.run import RunConfig

OWN = ("sparse", "sparse-float32", "sparse+state", "dense", "floor")
GROWING = ("sparse", "dense", "floor")
OBJECTIVES = ("reference", "scale_free", "predictive")
LIBRARIES = ("sae_lens", "sparsify", "dictionary_learning")
GROWTH = "0.25,0.5,2,4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="embedded", help="sizes of a known model's run")
    parser.add_argument("--activation-dim", "-D", type=int, metavar="D", help="width of the activations")
    parser.add_argument("--dict-size", "-F", type=int, metavar="F", help="latents")
    parser.add_argument("--k", "-k", type=int, help="active latents per token")
    parser.add_argument("--batch-size", "-B", type=int, metavar="B", help="pairs (or tokens) per step")
    parser.add_argument("--kind", default="temporal", help="sae.kind of a run")
    parser.add_argument("--objective", choices=OBJECTIVES, default="reference", help="of a temporal SAE")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and activations; bfloat16: of the encoder product of `sparse` and `floor` alone",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dead", type=float, default=0.0, help="share of dead latents, so that aux-k has work")
    parser.add_argument("--against", default="", metavar="LIBRARY[=PYTHON],…", help=f"of {', '.join(LIBRARIES)}")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=("cpu", "wall"), help="processor or wall time (default: cpu with one thread, else wall)"
    )
    parser.add_argument(
        "--growth", nargs="?", const=GROWTH, default="", metavar="FACTORS", help=f"also F, then B, times {GROWTH}"
    )
    parser.add_argument("--growth-rounds", type=int, default=3)
    parser.add_argument(
        "--processes", default="", metavar="1,2,4", help="instead of all that: the same training by so many processes"
    )
    parser.add_argument("--steps", type=int, default=60, help="how long those train")
    parser.add_argument("--store-mb", type=int, default=256, help="size of the store that is read; 0: no rates")
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="a run's configuration: its language model, in its contexts, is what the harvest reads (default: the embedded one)",
    )
    parser.add_argument(
        "--sweep",
        metavar="'SWEEP section.key=value …'",
        help="instead of all that: run a sweep from nothing on this machine, and see what is busy meanwhile",
    )
    parser.add_argument("--out", type=Path, help="folder for JSON and figure (default: TSAE_HOME/benchmarks)")


def run(options: argparse.Namespace) -> Path:
    """Measure, print tables, write `<shape>.json` and `<shape>.png`; return the JSON's path. Raises TsaeError."""
    if options.sweep is not None:
        return _run_sweep(options.sweep, options.out or home() / "benchmarks")
    sizes = {
        name: size if (given := getattr(options, name)) is None else given
        for name, size in PRESETS[options.preset].items()
    }
    shape = Shape(
        **sizes,
        kind=options.kind,
        objective=options.objective,
        dtype=options.dtype,
        device=options.device,
        dead=options.dead,
    )
    factors = _numbers("--growth", options.growth, GROWTH)
    against, interpreters = _libraries(options.against)
    _check(options, shape)
    read = _read_by_harvest(options.config, shape.device)
    folder = options.out or home() / "benchmarks"
    if options.processes:
        return _run_groups(options, shape, folder)
    _make(folder)
    import torch

    from tsae.bench import figure, rates, report
    from tsae.bench.contestants import TF32
    from tsae.bench.rounds import Plan, measure

    clock = options.clock or ("cpu" if options.threads == 1 else "wall")
    plan = Plan(
        rounds=options.rounds, warmup=options.warmup, threads=options.threads, clock=clock, interpreters=interpreters
    )
    results: dict[str, Any] = {"rates": None, "step": None, "growth": []}
    if options.store_mb:
        torch.set_num_threads(options.threads)
        results["rates"] = rates.measure(shape, options.store_mb, options.rounds, read, folder)
        print(report.rates_table(results["rates"]), flush=True)
    own: tuple[str, ...] = OWN
    if shape.device != "cpu":
        own, against = (*OWN, f"dense{TF32}"), [name for each in against for name in (each, each + TF32)]
    results["step"] = report.record_of(shape, plan, measure(own, shape, plan, against))
    print(report.table(results["step"]), flush=True)
    results["resuming"] = {
        **report.saving_cost(results["step"]),
        "resume_seconds": rates.resume_seconds(shape, options.rounds),
    }
    print(report.resuming_line(results["resuming"]), flush=True)
    if factors:
        short = dataclasses.replace(plan, rounds=options.growth_rounds, warmup=2)
        others = [report.record_of(size, short, measure(GROWING, size, short)) for size in _sizes(shape, factors)]
        results["growth"] = [results["step"], *others]
        print(report.growth_table(results["growth"]), flush=True)
    results["machine"] = report.machine(shape.device)
    path: Path = folder / f"{shape.name}.json"
    metadata.write(path, results)
    figure.draw(path.with_suffix(".png"), results)
    return path


def _read_by_harvest(path: str | None, device: str) -> RunConfig:
    """The configuration whose language model is harvested. Raises TsaeError for one without."""
    from tsae.config import run as configuration

    config = configuration.from_mapping({}, "bench") if path is None else configuration.load(path)
    if config.without_text:
        raise TsaeError(f"--config {path}: trains on {config.without_text}, so no language model is harvested for it")
    return configuration.replace(config, model={"device": device})


def _make(folder: Path) -> None:
    """The folder of the results, before what takes minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise TsaeError(f"--out {folder}: nothing may be written there; name another folder")


def _run_sweep(given: str, folder: Path) -> Path:
    from tsae.bench import busy, figure, report
    from tsae.config.points import file_name

    try:
        arguments = shlex.split(given)
    except ValueError as error:
        raise TsaeError(f"--sweep: {given!r} cannot be read as a command line: {error}") from error
    words = iter(arguments)
    for word in words:
        if word in ("--base", "--name"):
            next(words, None)
        elif word.startswith(("--base=", "--name=")):
            continue
        elif word.startswith("-"):
            raise TsaeError(
                f"--sweep: {word}: beside the sweep and its settings only --base and --name may stand there"
            )
    if not arguments:
        raise TsaeError("--sweep: name a sweep, such as --sweep split_fraction")
    _make(folder)
    results = busy.measure(arguments, folder)
    print(report.busy_table(results), flush=True)
    name = [Path(arguments[0]).stem, *arguments[1:]]
    path = folder / f"{file_name('-'.join(['sweep', *name]))}.json"
    metadata.write(path, {**results, "machine": report.machine("cpu")})
    figure.draw_busy(path.with_suffix(".png"), results)
    return path


def _run_groups(options: argparse.Namespace, shape: Shape, folder: Path) -> Path:
    from tsae.bench import figure, groups, report

    worlds = _numbers("--processes", options.processes, "1,2,4")
    if not all(world == int(world) for world in worlds):
        raise TsaeError(f"--processes: {options.processes!r} is not a list of whole numbers such as 1,2,4")
    _make(folder)
    records = groups.measure(shape, sorted({1, *map(int, worlds)}), options.steps, options.threads)
    print(report.groups_table(records), flush=True)
    results = {"shape": shape.as_dict(), "groups": records, "machine": report.machine(shape.device)}
    path = folder / f"processes-{shape.name}.json"
    metadata.write(path, results)
    figure.draw_groups(path.with_suffix(".png"), results)
    return path


def _libraries(given: str) -> tuple[list[str], dict[str, str]]:
    """Names of libraries, and the interpreters of those that have one of their own."""
    names, interpreters = [], {}
    for part in filter(None, given.split(",")):
        name, equals, python = part.strip().partition("=")
        if name not in LIBRARIES:
            raise TsaeError(
                f"--against: {name!r} is not known; {suggestion(name, LIBRARIES)}known: {', '.join(LIBRARIES)}"
            )
        if equals and not Path(python).is_file():
            raise TsaeError(f"--against: {python} is not a file; name the Python interpreter that has {name}")
        names.append(name)
        if equals:
            interpreters[name] = python
    return names, interpreters


def _check(options: argparse.Namespace, shape: Shape) -> None:
    """Refuse what cannot be measured, before anything starts."""
    shape.run_config("sparse")
    for name in ("activation_dim", "rounds", "threads", "growth_rounds", "steps"):
        value = getattr(shape, name, None) or getattr(options, name)
        if value < 1:
            raise TsaeError(f"--{name.replace('_', '-')} {value} is impossible; it must be at least 1")
    if shape.objective != "reference" and not is_paired(shape.kind):
        raise TsaeError(f"--objective {shape.objective}: a {shape.kind} SAE has no temporal term; leave it out")
    if not 0 <= shape.dead < 1:
        raise TsaeError(f"--dead {shape.dead} is impossible; a share in [0, 1) is allowed")
    for name in ("warmup", "store_mb"):
        if getattr(options, name) < 0:
            raise TsaeError(f"--{name.replace('_', '-')} {getattr(options, name)} is impossible; it must be at least 0")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", shape.device):
        raise TsaeError(f"--device {shape.device} is not known; allowed: cpu, cuda, cuda:N")
    if shape.device != "cpu":
        import torch

        if int(shape.device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise TsaeError(f"--device {shape.device}: torch sees no such GPU here; use --device cpu")


def _numbers(option: str, given: str, example: str) -> list[float]:
    try:
        numbers = [float(part) for part in given.split(",") if part.strip()]
    except ValueError:
        numbers = [0.0]
    if not all(number > 0 for number in numbers):
        raise TsaeError(f"{option}: {given!r} is not a list of positive numbers such as {example}")
    return numbers


def _sizes(shape: Shape, factors: list[float]) -> list[Shape]:
    """The shape with other dictionaries, then with other batches. Raises TsaeError for sizes that cannot be."""
    sizes = [
        Shape(**{**shape.as_dict(), name: int(getattr(shape, name) * factor)})
        for name in ("dict_size", "batch_size")
        for factor in factors
        if factor != 1
    ]
    for size in sizes:
        size.run_config("sparse")
    return sizes
