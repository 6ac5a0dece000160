"""What the seeds say of the paper's claims."""

from __future__ import annotations

import html
import json

import pytest

from tsae.cli import main
from tsae.report import claims
from tsae.report import write as report
from tsae.report.claims import CLAIMS, Claim
from tsae.report.summary import Row
from tsae.runtime.errors import TsaeError
from tsae.sweep.plan import make_plan
from tsae.sweep.sweepfile import load_sweep

SMOOTHER = Claim("smoother", "lipschitz_cont_h", "matryoshka", "lipschitz_cont_h", below=0.0)
BETTER = Claim("better", "lipschitz_cont_h", "matryoshka", "lipschitz_cont_h", above=0.0)
EQUAL = Claim("equal", "l0", "matryoshka", "l0", -0.5, 0.5)
NOT_MEASURED = Claim("not measured", "l0", "batch_topk", "l0", above=0.0)


def rows_of(plan, gains):
    """Smoothness of a T-SAE that is lower by `gains`, seed by seed; all else is equal."""
    rows = []
    for point in plan.points:
        seed, temporal = point.axes["training.seed"], point.axes["sae.kind"] == "temporal"
        results = {"lipschitz_cont_h": seed + (0.0 if temporal else gains[seed]), "l0": 16.0 + 0.1 * seed * temporal}
        rows.append(Row(point, results, {}, ""))
    return rows


@pytest.fixture
def plan(plan_of):
    """Two kinds with three seeds each."""
    return plan_of(grid={"sae.kind": ["temporal", "matryoshka"], "training.seed": [0, 1, 2]})


def test_differences_by_seed_decide_though_seeds_differ_more_than_kinds(plan):
    verdicts = claims.judge(rows_of(plan, [0.10, 0.11, 0.12]), [SMOOTHER, BETTER, EQUAL, NOT_MEASURED])
    assert [verdict.word for verdict in verdicts] == ["holds", "fails", "holds", "undecided"]
    assert verdicts[0].difference == pytest.approx(-0.11)
    assert verdicts[0].half_width_95 == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)
    assert verdicts[3].seeds == 0


def test_an_interval_across_the_bound_is_undecided(plan):
    [smoother, better] = claims.judge(rows_of(plan, [0.3, -0.1, 0.1]), [SMOOTHER, BETTER])
    assert (smoother.word, better.word) == ("undecided", "undecided")
    [alone] = claims.judge(
        [row for row in rows_of(plan, [1, 1, 1]) if row.point.axes["training.seed"] == 0], [SMOOTHER]
    )
    assert (alone.word, alone.seeds) == ("undecided", 1)


def test_the_command_writes_a_table_of_what_is_there(write_sweep, home, capsys):
    path = write_sweep(file="kinds", grid={"sae.kind": ["temporal", "batch_topk"], "training.seed": [0, 1]})
    assert main(["claims", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {claim.text} |" in printed for claim in CLAIMS)
    [written] = home.glob("sweeps/*/report/claims.json")
    assert {claim["word"] for claim in json.loads(written.read_text())["claims"]} == {"undecided"}


def test_other_axes_than_kind_and_seed_are_refused(plan_of):
    with pytest.raises(TsaeError, match=r"sae\.k varies"):
        claims.write_claims(plan_of(grid={"sae.kind": ["temporal", "matryoshka"], "sae.k": [4, 8]}).compared)


def test_the_report_holds_the_claims_and_what_decides_them(write_sweep, home):
    grid = {"sae.kind": ["temporal", "matryoshka"], "training.seed": [0, 1]}
    path = write_sweep(file="judged", grid=grid, report={"claims": True})
    page = report.write_report(make_plan(load_sweep(path)).compared).read_text()
    assert all(claim.text in html.unescape(page) for claim in CLAIMS)
    assert f"python launch/sweep.py {path} --base pythia-160m" in page
    assert list(home.glob("sweeps/*/report/claims.json"))
    larger = report.write_report(make_plan(load_sweep(path, "pythia-160m")).compared).read_text()
    assert "The paper's claims" in larger
    assert "--base pythia-160m" not in larger
