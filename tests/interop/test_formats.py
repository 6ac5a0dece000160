"""The table of deviations."""

from __future__ import annotations

from tsae.cli import main
from tsae.interop.formats import TOLERANCE, deviations, installed
from tsae.sae.classes import CLASSES


def test_every_class_survives_every_format_to_1e_6() -> None:
    rows = list(deviations())
    assert all(max(row.encode, row.decode) <= TOLERANCE for row in rows), rows
    trips = {(row.dict_class, row.format) for row in rows}
    assert trips >= {(name, form) for name in CLASSES for form in ("sae_lens", "sae_bench", "reference")}
    assert ("SAELens" in {row.read_by for row in rows}) == installed()


def test_the_command_prints_one_line_per_trip(capsys) -> None:
    assert main(["formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("TemporalMatryoshkaBatchTopKSAE") for line in lines) >= 3
