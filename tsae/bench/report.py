"""The figures of a benchmark as a JSON-able record and as a table to read."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tsae.bench.rounds import Measured, Plan, Result
from tsae.bench.shape import Shape

MB = 10**6


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
        "state_bytes": entry.state_bytes,
        "peak_bytes": entry.peak_bytes,
        "beyond_state_bytes": entry.beyond_state_bytes,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured, and how busy the machine was at the end."""
    import torch

    described = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tsae": metadata.version("tsae"),
        "command": " ".join(["tsae", *sys.argv[1:]]),
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


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
    return "\n".join(lines)


def growth_table(records: list[dict[str, Any]]) -> str:
    """Seconds and ratios over dictionary and batch sizes."""
    lines = [
        f"{'F':>8}{'B':>8}{'sparse s':>12}{'dense s':>12}{'floor s':>12}{'dense / sparse':>16}{'MB beyond state':>17}"
    ]
    for record in records:
        by_name = {entry["name"]: entry for entry in record["contestants"]}
        seconds = [by_name[name]["seconds"]["median"] for name in ("sparse", "dense", "floor")]
        beyond = by_name["sparse"]["beyond_state_bytes"]
        ratio, memory = seconds[1] / seconds[0], "?" if beyond is None else f"{beyond / MB:.0f}"
        sizes = f"{record['shape']['dict_size']:>8}{record['shape']['batch_size']:>8}"
        lines.append(sizes + "".join(f"{value:>12.4g}" for value in seconds) + f"{ratio:>16.2f}{memory:>17}")
    return "\n".join(lines)


def rates_table(rates: dict[str, Any]) -> str:
    """How fast activations are read and made, and what smoothness costs."""
    store, memmap = rates["store_pairs_per_second"], rates["memmap_pairs_per_second"]
    harvest, smoothness = rates["harvest_tokens_per_second"], rates["smoothness_seconds_per_context"]
    return "\n".join(
        [
            f"store: {_rate(store)} pairs/s (mixed, checked, widened); random rows of a memory map: {_rate(memmap)}",
            f"harvest: {_rate(harvest)} tokens/s of the embedded language model alone",
            f"smoothness, all measures: {1000 * smoothness['median']:.2f} CPU ms per context of 128 tokens",
        ]
    )


def _rate(values: dict[str, float]) -> str:
    return f"{values['median']:.0f} ({values['lowest']:.0f}-{values['highest']:.0f})"
