"""The figures of a benchmark as a JSON-able record and as a table to read."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tsae.bench.rounds import Measured, Plan, Result
from tsae.bench.shape import Shape
from tsae.runtime.secrets import hide

MB = 10**6
LONGEST = 44
STATE_EVERY = 50
"""Steps between states, for which the cost is told."""


def record_of(shape: Shape, plan: Plan, result: Result) -> dict[str, Any]:
    """Everything that was measured at one shape; ratios are times of a contestant over those of the sparse path."""
    sparse = result.measured[0]
    return {
        "shape": shape.as_dict(),
        "rounds": plan.rounds,
        "threads": plan.threads,
        "clock": "wall" if shape.device != "cpu" else plan.clock,
        "contestants": [_contestant(entry, sparse, shape) for entry in result.measured],
        "missing": result.missing,
    }


def _contestant(entry: Measured, sparse: Measured, shape: Shape) -> dict[str, Any]:
    ratios = [own / base for own, base in zip(entry.seconds, sparse.seconds, strict=True)]
    ratio = {"median": entry.median / sparse.median, "lowest": min(ratios), "highest": max(ratios)}
    return {
        "name": entry.name,
        "library": entry.library,
        "algorithm": entry.algorithm,
        "seconds": {**spread(entry.seconds), "rounds": entry.seconds},
        "ratio_to_sparse": ratio,
        "pairs_per_second": shape.batch_size / entry.median,
        "encoded_per_second": entry.encoded / entry.median,
        "phases": entry.median_phases(),
        "calls": entry.calls,
        "state_bytes": entry.state_bytes,
        "peak_bytes": entry.peak_bytes,
        "beyond_state_bytes": entry.beyond_state_bytes,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def saving_cost(record: dict[str, Any]) -> dict[str, Any]:
    """What a state every `STATE_EVERY` steps adds to the step time, as a share of it, from a record with both contestants."""
    by_name = {entry["name"]: entry["seconds"]["rounds"] for entry in record["contestants"]}
    pairs = zip(by_name["sparse+state"], by_name["sparse"], strict=True)
    return {
        "every": STATE_EVERY,
        "share_of_step_time": spread([(saving / plain - 1) / STATE_EVERY for saving, plain in pairs]),
    }


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured, and how busy the machine was at the end."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    described = {
        "processor": named[0] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tsae": metadata.version("tsae"),
        "command": hide(" ".join(["tsae", *sys.argv[1:]])),
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def table(record: dict[str, Any]) -> str:
    """One shape's contestants, then the phases of this package's own paths."""
    shape, contestants = record["shape"], record["contestants"]
    unit = "CPU s" if record["clock"] == "cpu" else "s"
    lines = [
        f"D {shape['activation_dim']}  F {shape['dict_size']}  k {shape['k']}  B {shape['batch_size']}  "
        f"{shape['kind']}  {shape['dtype']}  {shape['device']}  {record['threads']} thread(s)  "
        f"{record['rounds']} rounds, medians (lowest-highest)",
        f"{'':22}{unit + ' / step':>24}{'x sparse':>22}{'pairs/s':>10}{'encoded/s':>11}{'MB beyond state':>17}",
    ]
    for entry in contestants:
        seconds, ratio, beyond = entry["seconds"], entry["ratio_to_sparse"], entry["beyond_state_bytes"]
        shown = f"{seconds['median']:.4g} ({seconds['lowest']:.4g}-{seconds['highest']:.4g})"
        against = f"{ratio['median']:.2f} ({ratio['lowest']:.2f}-{ratio['highest']:.2f})"
        memory = "?" if beyond is None else f"{beyond / MB:.0f}"
        lines.append(
            f"{entry['name']:22}{shown:>24}{against:>22}{entry['pairs_per_second']:>10.0f}"
            f"{entry['encoded_per_second']:>11.0f}{memory:>17}"
        )
    lines += [f"  {entry['name']}: {entry['library']}: {entry['algorithm']}" for entry in contestants]
    lines += [f"  {reason}" for reason in record["missing"].values()]
    if any((entry["beyond_state_bytes"] or 0) < 0 for entry in contestants):
        lines.append("  MB beyond state: below weights, gradients and both moments where gradients are never stored")
    for entry in contestants:
        if len(entry["phases"]) > 1:
            total = sum(entry["phases"].values())
            parts = [f"{name} {100 * part / total:.0f} %" for name, part in entry["phases"].items() if part > 0]
            lines.append(f"  phases of {entry['name']}: {', '.join(parts)}")
    lines += [_calls_line(entry) for entry in contestants if entry["calls"]]
    return "\n".join(lines)


def _calls_line(entry: dict[str, Any]) -> str:
    calls = entry["calls"]
    return (
        f"  a step of {entry['name']}: {calls['launches']} launches and {calls['graphs']} graphs of {calls['kernels']} "
        f"kernels in all, {calls['copies']} copies; the host waits {calls['waits']} times"
    )


def growth_table(records: list[dict[str, Any]]) -> str:
    """Seconds and ratios over dictionary and batch sizes; `-` where a contestant had not the memory."""
    lines = [
        f"{'F':>8}{'B':>8}{'sparse s':>12}{'dense s':>12}{'floor s':>12}{'dense / sparse':>16}{'MB beyond state':>17}"
    ]
    for record in records:
        by_name = {entry["name"]: entry for entry in record["contestants"]}
        seconds = [entry and entry["seconds"]["median"] for entry in map(by_name.get, ("sparse", "dense", "floor"))]
        beyond, (sparse, dense, _) = by_name["sparse"]["beyond_state_bytes"], seconds
        memory = None if beyond is None else beyond / MB
        sizes = f"{record['shape']['dict_size']:>8}{record['shape']['batch_size']:>8}"
        cells = [f"{'-' if value is None else f'{value:.4g}':>12}" for value in seconds]
        ratio = "-" if dense is None else f"{dense / sparse:.2f}"
        lines.append(sizes + "".join(cells) + f"{ratio:>16}{'?' if memory is None else f'{memory:.0f}':>17}")
    return "\n".join(lines)


def rates_table(rates: dict[str, Any]) -> str:
    """How fast activations are read and made, and what smoothness costs."""
    store, memmap = rates["store_pairs_per_second"], rates["memmap_pairs_per_second"]
    training, harvest, smoothness = rates["training"], rates["harvest"], rates["smoothness_seconds_per_context"]
    megabytes = harvest["bytes_per_token"] * harvest["tokens_per_second"]["median"] / MB
    return "\n".join(
        [
            f"store: {_rate(store)} pairs/s (mixed, checked, widened); random rows of a memory map: {_rate(memmap)}",
            f"training from it: {_rate(training['pairs_per_second'])} pairs/s, {_share(training)} of the bare steps; "
            f"start and end {training['start_and_end_seconds']['median']:.2g} s",
            f"harvest of {harvest['model']}, {harvest['hook_path']}, {harvest['dtype']}, {harvest['batch_size']} contexts of "
            f"{harvest['context_length']}: {_rate(harvest['tokens_per_second'])} tokens/s, {_share(harvest)} of the bare "
            f"forward pass; {megabytes:.0f} MB/s, where the disk takes {harvest['disk_bytes_per_second']['median'] / MB:.0f}",
            f"smoothness, all measures: {1000 * smoothness['median']:.2f} CPU ms per context of 128 tokens",
        ]
    )


def _share(rates: dict[str, Any]) -> str:
    share = rates["share_of_bare"]
    return f"{share['median']:.0%} ({share['lowest']:.0%}-{share['highest']:.0%})"


def _rate(values: dict[str, float]) -> str:
    return f"{values['median']:.0f} ({values['lowest']:.0f}-{values['highest']:.0f})"


def resuming_line(costs: dict[str, Any]) -> str:
    """What it costs to be resumable."""
    share, seconds = costs["share_of_step_time"], costs["resume_seconds"]
    return (
        f"a resumable state every {costs['every']} steps: {100 * share['median']:+.1f} % of the step time "
        f"({100 * share['lowest']:+.1f} to {100 * share['highest']:+.1f}); resumed in {seconds['median']:.2g} s"
    )


def shortened(name: str) -> str:
    """A stage's name where there is little room."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def busy_table(results: dict[str, Any]) -> str:
    """One line for each stage of a sweep."""
    names = [shortened(stage["stage"]) for stage in results["stages"]]
    wide = max(map(len, names))
    lines = [
        f"{'stage':{wide}}{'from s':>9}{'seconds':>9}{'first step after s':>20}{'cores busy':>12}{'GPUs busy':>11}"
    ]
    for name, stage in zip(names, results["stages"], strict=True):
        first, cores, gpus = stage["first_step_after"], stage["cores"], stage["gpus"]
        lines.append(
            f"{name:{wide}}{stage['start']:>9.1f}{stage['end'] - stage['start']:>9.1f}"
            f"{'-' if first is None else f'{first:.1f}':>20}{'?' if cores is None else f'{cores:.2f}':>12}"
            f"{'-' if gpus is None else f'{gpus:.0%}':>11}"
        )
    return "\n".join([*lines, f"{results['seconds']:.0f} s in all"])


def groups_table(records: Sequence[dict[str, Any]]) -> str:
    """One line for each training by one or several processes."""
    lines = [
        f"{'processes':>9}  {'shard':10}{'largest difference of a loss':>30}{'MB handed over / step':>23}"
        f"{'of them gradients':>19}{'s / step':>10}{'MB of state':>13}{'MB at most':>12}"
    ]
    for record in records:
        handed = statistics.median(record["bytes_handed"]) / 1e6
        gradients = record["gradient_bytes"] / 1e6 if record["processes"] > 1 else 0
        lines.append(
            f"{record['processes']:>9}  {record['shard']:10}{max(differences(record, records[0])):>30.1e}"
            f"{handed:>23.3f}{gradients:>19.3f}{statistics.median(record['seconds']):>10.3g}"
            f"{record['state_bytes'] / 1e6:>13.1f}{record['peak_bytes'] / 1e6:>12.1f}"
        )
    return "\n".join(lines)


def differences(record: dict[str, Any], alone: dict[str, Any]) -> list[float]:
    """Of each step's loss from that of another record, relative to it."""
    return [abs(found - wanted) / abs(wanted) for found, wanted in zip(record["loss"], alone["loss"], strict=True)]
