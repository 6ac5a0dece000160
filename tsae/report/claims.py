"""The paper's claims, judged on a sweep over kinds and seeds: `python launch/claims.py sweeps/claims.yaml`.

The report of a sweep with `report.claims` holds them as well.

Each claim is a difference, taken seed by seed, and the range in which it should lie. It holds if the whole 95 % interval
of the mean difference does, fails if no part of it does, and is undecided otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tsae.evaluation.measures import FVE
from tsae.report.compared import Compared
from tsae.runtime import files, metadata
from tsae.runtime.errors import TsaeError

if TYPE_CHECKING:
    from tsae.report.summary import Row

SMALL_BASE, DECIDING_BASE = "embedded", "pythia-160m"
"""What a claim does on a tiny model says little of the paper's; this base decides."""
HEAD = ("claim, of the T-SAE's high-level split", "difference", "95 % interval", "seeds", "")
FVE_COST = 0.02
"""A small loss of explained variance; the largest in the paper's Table 1 is 0.01."""
PROBE_MARGIN = 0.02
"""A difference of a probe's balanced accuracy that counts as none."""


@dataclass(frozen=True)
class Claim:
    """`measure` of the T-SAE less `other` of the SAE of another kind lies between `above` and `below`."""

    text: str
    measure: str
    kind: str
    """`temporal`: two measures of the same dictionary are compared."""
    other: str
    above: float = -math.inf
    below: float = math.inf


@dataclass(frozen=True)
class Verdict:
    """What the seeds say of a claim."""

    text: str
    seeds: int
    difference: float
    """Mean over the seeds; NaN without any."""
    half_width_95: float
    """NaN with fewer than two seeds."""
    word: str
    """`holds`, `fails` or `undecided`."""


def _against(kind: str, name: str, high: str, smoothness: str) -> list[Claim]:
    """The claims against one baseline, whose codes are probed in split `high`."""
    chunk = f"probing_chunk{high}"
    return [
        Claim(f"Smoother than {name}", "lipschitz_cont_h", kind, smoothness, below=0.0),
        Claim(f"Explains at most {FVE_COST} less variance than {name}", FVE, kind, FVE, above=-FVE_COST),
        Claim(f"Better for semantics than {name}", "probing_chunk0/semantics", kind, f"{chunk}/semantics", above=0.0),
        Claim(f"Better for context than {name}", "probing_chunk0/context", kind, f"{chunk}/context", above=0.0),
        _equal_syntax(f"Equal for syntax to {name}", "0", kind, high),
        # The paper's sentence is about whole dictionaries, too.
        _equal_syntax(f"Its whole dictionary: equal for syntax to {name}", "2", kind, "2"),
    ]


def _equal_syntax(text: str, own: str, kind: str, theirs: str) -> Claim:
    text = f"{text} (within {PROBE_MARGIN})"
    return Claim(text, f"probing_chunk{own}/syntax", kind, f"probing_chunk{theirs}/syntax", -PROBE_MARGIN, PROBE_MARGIN)


CLAIMS = (
    Claim("Smoother than its own low-level split", "lipschitz_cont_h", "temporal", "lipschitz_cont_l", below=0.0),
    *(
        Claim(
            f"Better for {label} than its own low-level split",
            f"probing_chunk0/{label}",
            "temporal",
            f"probing_chunk1/{label}",
            above=0.0,
        )
        for label in ("semantics", "context")
    ),
    *_against("matryoshka", "Matryoshka's", "0", "lipschitz_cont_h"),
    # Without a split, the whole code stands in: a harder comparison.
    *_against("batch_topk", "BatchTopK's", "2", "lipschitz_cont_tot"),
)
"""Of the high-level split of a T-SAE (arXiv 2511.05541, Table 1 and section 4.2)."""


def judge(rows: Sequence[Row], claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """The verdict on each claim, from points that differ in `sae.kind` and seeds alone."""
    values: dict[str, dict[tuple[object, ...], dict[str, float]]] = {}
    for row in rows:
        values.setdefault(str(row.point.value("sae.kind")), {})[row.seed] = row.values
    verdicts = []
    for claim in claims:
        theirs = values.get(claim.kind, {})
        differences = [
            own[claim.measure] - theirs[seed][claim.other]
            for seed, own in values.get("temporal", {}).items()
            if claim.measure in own and claim.other in theirs.get(seed, {})
        ]
        verdicts.append(_verdict(claim, differences))
    return verdicts


def _verdict(claim: Claim, differences: Sequence[float]) -> Verdict:
    from tsae.evaluation.statistics import student_interval

    if len(differences) < 2:
        mean = differences[0] if differences else math.nan
        return Verdict(claim.text, len(differences), mean, math.nan, "undecided")
    mean, half = student_interval(differences)
    low, high = mean - half, mean + half
    if claim.above < low and high < claim.below:
        word = "holds"
    elif high <= claim.above or low >= claim.below:
        word = "fails"
    else:
        word = "undecided"
    return Verdict(claim.text, len(differences), mean, half, word)


def as_text(compared: Compared, verdicts: Sequence[Verdict]) -> str:
    """The verdicts as Markdown, and the command that decides what they leave open."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---:|---:|---:|---|"]
    lines += ["| " + " | ".join(_cells(verdict)) + " |" for verdict in verdicts]
    return "\n".join(lines) + "\n" + _outlook(compared, verdicts)


def section(compared: Compared, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The same for the report's page."""
    return {
        "head": HEAD,
        "rows": [_cells(verdict) for verdict in verdicts],
        "outlook": _outlook(compared, verdicts).strip(),
    }


def _cells(verdict: Verdict) -> tuple[str, str, str, str, str]:
    mean, half = verdict.difference, verdict.half_width_95
    interval = "–" if math.isnan(half) else f"{mean - half:+.3f} to {mean + half:+.3f}"
    return verdict.text, "–" if math.isnan(mean) else f"{mean:+.3f}", interval, str(verdict.seeds), verdict.word


def _outlook(compared: Compared, verdicts: Sequence[Verdict]) -> str:
    """The command that decides what did not hold on the small model; nothing if all did."""
    open_ones = sum(verdict.word != "holds" for verdict in verdicts)
    if not open_ones or compared.base.stem != SMALL_BASE:
        return ""
    return (
        f"\n{open_ones} of {len(verdicts)} do not hold or stay open on this small model; what decides them:\n"
        f"    python launch/sweep.py {compared.origin} --base {DECIDING_BASE}\n"
    )


def write_claims(compared: Compared) -> list[Verdict]:
    """Judge the results that are there; writes claims.json and claims.md beside the report's page.

    Raises TsaeError if the sweep varies more than kind and seed.
    """
    from tsae.report.summary import SEED_AXES, summarise

    varying = {key for point in compared.points for key in point.axes} - {"sae.kind", *SEED_AXES}
    if varying:
        raise TsaeError(
            f"{compared.origin}: claims are judged on sae.kind and seeds alone; {', '.join(sorted(varying))} varies"
        )
    verdicts = judge(summarise(compared).rows)
    folder = compared.page.parent
    folder.mkdir(parents=True, exist_ok=True)
    plain = [
        {name: None if value != value else value for name, value in asdict(verdict).items()} for verdict in verdicts
    ]
    metadata.write(folder / "claims.json", {"sweep": compared.name, "claims": plain})
    files.write_text(folder / "claims.md", as_text(compared, verdicts))
    return verdicts
