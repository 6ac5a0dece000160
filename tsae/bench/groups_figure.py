"""Trainings by one and by several processes as one figure: losses, their differences, bytes handed over, memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae import plotting
from tsae.bench.groups import differences

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROUNDING = 1e-5
SHOWN = (3e-13, 1e-4)
"""Relative differences; leaves room for a legend below one bit of a float32."""


def draw(path: Path, results: dict[str, Any]) -> None:
    """Write the figure of the records of one shape to `path`."""
    records = results["groups"]
    plain = [record for record in records if record["shard"] == "none"]
    with plotting.figure(path, rows=2, columns=2, size=(9, 6)) as (_, panels):
        _draw_losses(panels[0], plain, results["shape"])
        _draw_differences(panels[1], records)
        _draw_bytes(panels[2], records, results["shape"])
        _draw_memory(panels[3], records)


def _draw_losses(axes: Axes, records: Sequence[dict[str, Any]], shape: dict[str, Any]) -> None:
    for series, record in enumerate(records):
        axes.plot(
            record["loss"],
            color=plotting.PALETTE[series],
            linewidth=6 / 2**series,
            label=_name(record),
        )
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
    _label(axes, several)
    axes.set_ylim(0, 1.45 * max(statistics.median(record["bytes_handed"]) for record in several) / 1e6)
    axes.set_ylabel("MB that a process hands over per step")
    axes.set_title(f"Communication (dense codes: {codes:.3g} MB)")
    axes.grid(axis="x", visible=False)
    axes.legend()


def _draw_memory(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for place, record in enumerate(records):
        state, peak = record["state_bytes"] / 1e6, record["peak_bytes"] / 1e6
        named = place == 0
        axes.bar(place - 0.2, state, width=0.4, color=plotting.PALETTE[2], label="training state" if named else None)
        axes.bar(place + 0.2, peak, width=0.4, color=plotting.PALETTE[6], label="at most, measured" if named else None)
        axes.annotate(f"{state:.3g}", (place - 0.2, state), xytext=(0, 2), textcoords="offset points", ha="center")
    _label(axes, records)
    axes.margins(y=0.25)
    axes.set_ylabel("MB in one process")
    axes.set_title("Memory")
    axes.grid(axis="x", visible=False)
    axes.legend()


def _label(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    sharded = {"none": "", "optimizer": "\nshard: optimizer"}
    axes.set_xticks(range(len(records)), [f"{record['processes']}{sharded[record['shard']]}" for record in records])
    axes.set_xlabel("processes")


def _name(record: dict[str, Any]) -> str:
    processes = record["processes"]
    name = "1 process" if processes == 1 else f"{processes} processes"
    return name if record["shard"] == "none" else f"{name}, shard: {record['shard']}"
