"""The benchmark as one figure (times, phases, memory, growth where it was measured), and trainings by several processes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae import plotting
from tsae.bench.report import differences, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = (
    "encoder product",
    "selection",
    "decode",
    "contrast",
    "aux-k",
    "weight gradients",
    "projection and norm",
    "optimizer",
    "other",
)
COLOURS = (*plotting.PALETTE[:4], "#999933", *plotting.PALETTE[4:6], "#7F7F7F", "#C8C8C8")
SERIES = ("sparse", "dense", "floor")

ROUNDING = 1e-5
SHOWN = (3e-13, 1e-4)
"""Relative differences; leaves room for a legend below one bit of a float32."""


def draw(path: Path, results: dict[str, Any]) -> None:
    """Write the figure of a benchmark's results to `path`."""
    growth, rates = results["growth"], results["rates"]
    columns = 4 if rates else 3
    size = (11 / 3 * columns, 6.2 if growth else 3.2)
    with plotting.figure(path, rows=2 if growth else 1, columns=columns, size=size) as (_, panels):
        _draw_times(panels[0], results["step"])
        _draw_phases(panels[1], results["step"])
        _draw_memory(panels[2], results["step"])
        if rates:
            _draw_shares(panels[3], rates)
        if growth:
            base, (over_f, over_b, ratios, *more) = results["step"]["shape"], panels[columns:]
            for axes, varied, fixed in ((over_f, "dict_size", "batch_size"), (over_b, "batch_size", "dict_size")):
                records = [record for record in growth if record["shape"][fixed] == base[fixed]]
                _draw_growth(axes, records, varied)
            _draw_ratios(ratios, growth, base)
            for axes in more:
                axes.set_axis_off()


def _draw_times(axes: Axes, record: dict[str, Any]) -> None:
    entries = record["contestants"][::-1]
    unit = "CPU seconds" if record["clock"] == "cpu" else "seconds"
    for place, entry in enumerate(entries):
        seconds = entry["seconds"]
        own = entry["library"] in ("tsae", "torch")
        axes.barh(place, seconds["median"], color=plotting.PALETTE[0] if own else plotting.PALETTE[6], height=0.65)
        axes.plot([seconds["lowest"], seconds["highest"]], [place, place], color="black", linewidth=1)
        ratio = entry["ratio_to_sparse"]["median"]
        axes.annotate(
            f"{seconds['median']:.3g} ({ratio:.2g}×)",
            (seconds["highest"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    axes.set_xlim(0, 1.6 * max(entry["seconds"]["highest"] for entry in entries))
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(f"{unit} per step (× sparse)")
    axes.grid(axis="y", visible=False)
    shape = record["shape"]
    objective = "" if shape["objective"] == "reference" else f", {shape['objective']}"
    sizes = f"D {shape['activation_dim']}, F {shape['dict_size']}, B {shape['batch_size']}, k {shape['k']}"
    axes.set_title(sizes + objective)


def _draw_phases(axes: Axes, record: dict[str, Any]) -> None:
    # A state is written outside the phases of a step.
    entries = [e for e in record["contestants"][::-1] if len(e["phases"]) > 1 and e["name"] != "sparse+state"]
    for place, entry in enumerate(entries):
        total, left = sum(entry["phases"].values()), 0.0
        for name, colour in zip(PHASES, COLOURS, strict=True):
            share = 100 * entry["phases"].get(name, 0.0) / total
            axes.barh(place, share, left=left, color=colour, height=0.65, label=name if place == 0 else None)
            left += share
    axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the step (%)")
    axes.grid(visible=False)
    axes.set_title("Phases")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), fontsize=7.5)


def _draw_memory(axes: Axes, record: dict[str, Any]) -> None:
    known = [entry for entry in record["contestants"][::-1] if entry["beyond_state_bytes"] is not None]
    for place, entry in enumerate(known):
        megabytes = entry["beyond_state_bytes"] / 1e6
        axes.barh(place, megabytes, color=plotting.PALETTE[2], height=0.65)
        axes.annotate(f"{megabytes:.0f}", (megabytes, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(known)), [entry["name"] for entry in known])
    axes.margins(x=0.2)
    axes.set_xlabel("MB beyond the training state")
    axes.grid(axis="y", visible=False)
    axes.set_title("Peak memory")


def _draw_shares(axes: Axes, rates: dict[str, Any]) -> None:
    """How much of what is possible a training from a store and a harvest reach."""
    training, harvest = rates["training"], rates["harvest"]
    written = harvest["bytes_per_token"] * harvest["tokens_per_second"]["median"]
    found = {
        "harvest\nof the disk": (written / harvest["disk_bytes_per_second"]["median"], f"{written / 1e6:.3g} MB/s"),
        "harvest of the\nbare forward pass": (
            harvest["share_of_bare"]["median"],
            f"{harvest['tokens_per_second']['median']:,.0f} tokens/s",
        ),
        "training of\nits bare steps": (
            training["share_of_bare"]["median"],
            f"{training['pairs_per_second']['median']:,.0f} pairs/s",
        ),
    }
    for place, (share, rate) in enumerate(found.values()):
        axes.barh(place, 100 * share, color=plotting.PALETTE[0], height=0.65)
        axes.annotate(rate, (100 * share, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(range(len(found)), list(found))
    axes.axvline(100, color="#444444", linestyle="--", linewidth=1)
    axes.set_xlim(0, 175)
    axes.set_xlabel("share of what is possible (%)")
    axes.grid(axis="y", visible=False)
    axes.set_title("End to end")


def _draw_growth(axes: Axes, records: list[dict[str, Any]], varied: str) -> None:
    records = sorted(records, key=lambda record: record["shape"][varied])
    sizes = [record["shape"][varied] for record in records]
    for series, name in enumerate(SERIES):
        seconds = [_seconds(record, name) for record in records]
        axes.plot(sizes, seconds, **_line(series), label=name)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size // 1024}k" if size % 1024 == 0 else str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("latents F" if varied == "dict_size" else "pairs B")
    axes.set_ylabel("seconds per step")
    axes.set_title("Growth over F" if varied == "dict_size" else "Growth over B")
    axes.legend()


def _draw_ratios(axes: Axes, growth: list[dict[str, Any]], base: dict[str, Any]) -> None:
    for series, (varied, fixed) in enumerate((("dict_size", "batch_size"), ("batch_size", "dict_size"))):
        records = sorted(
            (record for record in growth if record["shape"][fixed] == base[fixed]), key=lambda r: r["shape"][varied]
        )
        scale = [record["shape"][varied] / base[varied] for record in records]
        ratios = [_seconds(record, "dense") / _seconds(record, "sparse") for record in records]
        label = "over F" if varied == "dict_size" else "over B"
        axes.plot(scale, ratios, **_line(series + len(SERIES)), label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("size relative to the first panel's")
    axes.set_ylabel("dense / sparse time")
    axes.set_title("Gain of the sparse path")
    axes.legend()


def _line(series: int) -> dict[str, Any]:
    return {"color": plotting.PALETTE[series], "marker": plotting.MARKERS[series], "markeredgecolor": "white"}


def _seconds(record: dict[str, Any], name: str) -> float:
    """Not a number where it had not the memory."""
    found = (entry["seconds"]["median"] for entry in record["contestants"] if entry["name"] == name)
    return float(next(found, math.nan))


def draw_busy(path: Path, results: dict[str, Any]) -> None:
    """Write the figure of what a sweep kept busy to `path`: its stages, and below them cores and GPUs over the same time."""
    stages, at = results["stages"], [sample["at"] for sample in results["samples"]]
    rows = 3 if results["gpus"] else 2
    heights = [1 + 0.16 * len(stages), *[1.3] * (rows - 1)]
    size = (8, sum(heights) + 1)
    with plotting.figure(path, rows=rows, size=size, sharex=True, height_ratios=heights) as (_, panels):
        kinds = list(dict.fromkeys(stage["stage"].partition(" ")[0] for stage in stages))
        for place, stage in enumerate(stages):
            kind = stage["stage"].partition(" ")[0]
            colour = plotting.PALETTE[kinds.index(kind) % len(plotting.PALETTE)]
            panels[0].barh(-place, stage["end"] - stage["start"], left=stage["start"], color=colour, height=0.7)
            if stage["first_step_after"] is not None:
                first = stage["start"] + stage["first_step_after"]
                panels[0].plot([first, first], [-place - 0.35, -place + 0.35], color="black", linewidth=1.5)
        panels[0].set_yticks(
            [-place for place in range(len(stages))], [shortened(stage["stage"]) for stage in stages], fontsize=7
        )
        panels[0].grid(axis="y", visible=False)
        panels[0].set_title("Stages (a black mark: the first step)")
        cores = [sample["cores"] for sample in results["samples"]]
        panels[1].fill_between(at, cores, step="pre", color=plotting.PALETTE[0], linewidth=0)
        panels[1].set(ylabel="cores", ylim=(0, None), title="Busy cores")
        for series, (index, name) in enumerate(results["gpus"].items()):
            shares = [100 * sample["gpus"].get(index, math.nan) for sample in results["samples"]]
            colour = plotting.PALETTE[series % len(plotting.PALETTE)]
            panels[2].plot(at, shares, color=colour, linewidth=1, drawstyle="steps-pre", label=f"{index}: {name}")
        if results["gpus"]:
            panels[2].set(ylabel="% of the time", ylim=(0, 105), title="Busy GPUs")
            panels[2].legend()
        panels[-1].set_xlabel("s since the launch")


def draw_groups(path: Path, results: dict[str, Any]) -> None:
    """Write the figure of the records of one shape to `path`."""
    records = results["groups"]
    plain = [record for record in records if record["shard"] == "none"]
    with plotting.figure(path, rows=2, columns=2, size=(9, 6)) as (_, panels):
        _draw_losses(panels[0], plain, results["shape"])
        _draw_differences(panels[1], records)
        _draw_bytes(panels[2], records, results["shape"])
        _draw_groups_memory(panels[3], records)


def _draw_losses(axes: Axes, records: Sequence[dict[str, Any]], shape: dict[str, Any]) -> None:
    for series, record in enumerate(records):
        axes.plot(record["loss"], color=plotting.PALETTE[series], linewidth=6 / 2**series, label=_name(record))
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("loss")
    axes.set_title(f"D {shape['activation_dim']}, F {shape['dict_size']}, B {shape['batch_size']}, k {shape['k']}")
    axes.legend()


def _draw_differences(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for series, record in enumerate(records[1:], 1):
        found = [(step, distance) for step, distance in enumerate(differences(record, records[0])) if distance]
        axes.plot(
            [step for step, _ in found],
            [distance for _, distance in found],
            color=plotting.PALETTE[series],
            marker=plotting.MARKERS[series],
            markersize=3.5,
            linestyle="none",
            label=_name(record),
        )
    axes.axhline(ROUNDING, color="#444444", linestyle="--", linewidth=1)
    axes.annotate("tolerance of the tests", (0, ROUNDING), xytext=(2, 3), textcoords="offset points", fontsize=7.5)
    axes.set_yscale("log")
    axes.set_ylim(*SHOWN)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("relative difference of the loss")
    axes.set_title("Distance from one process (no mark: none)")
    axes.legend(loc="lower left")


def _draw_bytes(axes: Axes, records: Sequence[dict[str, Any]], shape: dict[str, Any]) -> None:
    several = [record for record in records if record["processes"] > 1]
    for place, record in enumerate(several):
        handed, gradients = statistics.median(record["bytes_handed"]) / 1e6, record["gradient_bytes"] / 1e6
        named = place == 0
        axes.bar(place, gradients, width=0.6, color=plotting.PALETTE[0], label="gradients" if named else None)
        axes.bar(
            place,
            handed - gradients,
            bottom=gradients,
            width=0.6,
            color=plotting.PALETTE[1],
            label="all else: weights, selection, negatives, sums" if named else None,
        )
        axes.annotate(f"{handed:.3g}", (place, handed), xytext=(0, 2), textcoords="offset points", ha="center")
    codes = 4 * shape["batch_size"] * shape["dict_size"] / 1e6
    _label_processes(axes, several)
    axes.set_ylim(0, 1.45 * max(statistics.median(record["bytes_handed"]) for record in several) / 1e6)
    axes.set_ylabel("MB that a process hands over per step")
    axes.set_title(f"Communication (dense codes: {codes:.3g} MB)")
    axes.grid(axis="x", visible=False)
    axes.legend()


def _draw_groups_memory(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for place, record in enumerate(records):
        state, peak = record["state_bytes"] / 1e6, record["peak_bytes"] / 1e6
        named = place == 0
        axes.bar(place - 0.2, state, width=0.4, color=plotting.PALETTE[2], label="training state" if named else None)
        axes.bar(place + 0.2, peak, width=0.4, color=plotting.PALETTE[6], label="at most, measured" if named else None)
        axes.annotate(f"{state:.3g}", (place - 0.2, state), xytext=(0, 2), textcoords="offset points", ha="center")
    _label_processes(axes, records)
    axes.margins(y=0.25)
    axes.set_ylabel("MB in one process")
    axes.set_title("Memory")
    axes.grid(axis="x", visible=False)
    axes.legend()


def _label_processes(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    sharded = {"none": "", "optimizer": "\nshard: optimizer"}
    axes.set_xticks(range(len(records)), [f"{record['processes']}{sharded[record['shard']]}" for record in records])
    axes.set_xlabel("processes")


def _name(record: dict[str, Any]) -> str:
    processes = record["processes"]
    name = "1 process" if processes == 1 else f"{processes} processes"
    return name if record["shard"] == "none" else f"{name}, shard: {record['shard']}"
