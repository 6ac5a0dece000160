"""The report as one HTML page that needs nothing else: styles and pictures are inside."""

from __future__ import annotations

import html
import itertools
import math
import time
from pathlib import Path

import yaml

from tsae.config.points import short_names, shown
from tsae.config.run import RunConfig
from tsae.report.comparison import Comparison, compare
from tsae.report.measures import LABELS, Chart, figures, label
from tsae.report.pictures import experiments_section, picture
from tsae.report.summary import Group, Summary
from tsae.report.text import sentences

STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #5f6368; --line: #dcdcdc; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.55 Charter, "Bitstream Charter", Cambria, Georgia, serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 72px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 38px 0 10px; padding-bottom: 5px; border-bottom: 1px solid var(--line); }
p { margin: 8px 0; max-width: 76ch; }
.lead, figcaption, .note { color: var(--soft); }
.note, figcaption { font-size: 13px; }
.lead { max-width: none; }
.missing { border-left: 3px solid #d55e00; background: #fff6f0; padding: 8px 14px; margin: 18px 0; font-size: 14px; overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
pre { background: #f7f7f7; padding: 12px 16px; overflow-x: auto; border-radius: 4px; }
.wide { overflow-x: auto; }
.tall { max-height: 75vh; overflow-y: auto; }
.tall thead { position: sticky; top: 0; background: #fff; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums lining-nums; }
thead th { font-weight: 600; vertical-align: bottom; padding-bottom: 3px; }
thead tr:first-child th { border-top: 1.5px solid var(--ink); }
thead tr:last-child th, thead th[rowspan] { border-bottom: 1px solid var(--ink); }
thead th.family { text-align: center; box-shadow: inset 0 -1px 0 var(--line); }
tbody tr:last-child > * { border-bottom: 1.5px solid var(--ink); }
th, td { padding: 4px 12px 4px 0; text-align: right; white-space: nowrap; }
th.key, td.key, .every th:first-child { text-align: left; }
tbody th { font-weight: 400; text-align: left; }
td small { display: block; color: var(--soft); font-size: 11.5px; line-height: 1.2; }
.every tbody th { position: sticky; left: 0; background: #fff; padding-right: 24px; }
.every tbody tr:hover > * { background: #f5f9fc; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 22px 30px; }
figure { margin: 0; break-inside: avoid; }
figure.panels { grid-column: 1 / -1; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { margin-top: 4px; line-height: 1.45; }
details summary { cursor: pointer; color: var(--accent); }
@media print { main { padding: 0; max-width: none; } .wide { overflow: visible; } }
@media (max-width: 520px) { .figures { grid-template-columns: 1fr; } main { padding: 20px 14px; } }
"""


LONG_TABLE = 40
"""Rows above which the summary scrolls in a box of its own."""
WIDE = 1200
"""Pixels of a picture that needs the page's whole width."""
MOST_MISSING = 12
"""Points with a trouble that are named."""
MOST_COLUMNS = 60
"""Points whose every measure fits into one table that a person would read."""


def render(summary: Summary, charts: list[tuple[Chart, Path]], claims: str = "") -> str:
    """The whole page; `claims` is a section of it."""
    compared = summary.compared
    title = html.escape(compared.name)
    body = [
        f"<h1>{title}</h1>",
        f'<p class="lead">{_lead(summary)}</p>',
        _missing(summary),
        _unbalanced(summary),
        "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences(summary)),
        claims,
        "<h2>Summary</h2>",
        f'<div class="wide{" tall" if len(summary.groups) > LONG_TABLE else ""}">{_summary_table(summary)}</div>',
        f'<p class="note">{_interval_note(summary)}</p>',
        _comparisons(compare(summary)),
        "<h2>Figures</h2>" if charts else "",
        f'<div class="figures">{"".join(_figure(chart, path, len(charts)) for chart, path in charts)}</div>',
        experiments_section(summary),
        "<h2>Every measure</h2>",
        f'<div class="wide">{_every_measure(summary)}</div>',
        "<h2>Settings</h2>",
        _settings(summary),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body>\n</html>\n"
    )


def _lead(summary: Summary) -> str:
    config = summary.compared.points[0].config
    axes = short_names([key for point in summary.compared.points for key in point.axes])
    done = len(summary.rows) - len(summary.missing)
    parts = [
        f"{done} of {len(summary.rows)} points over {', '.join(axes.values())}",
        *_source(config),
        time.strftime("%-d %B %Y, %H:%M"),
    ]
    return html.escape(" · ".join(parts))


def _source(config: RunConfig) -> list[str]:
    if config.is_synthetic:
        return [f"synthetic world ({config.synthetic.preset})"]
    return [
        f"{config.model.name}, {config.model.hook_point or f'layer {config.model.layer}'}",
        f"text: {config.data.source}",
    ]


def _missing(summary: Summary) -> str:
    if not summary.missing:
        return ""
    points = "; ".join(f"{row.point.name} ({row.missing})" for row in summary.missing[:MOST_MISSING])
    more = len(summary.missing) - MOST_MISSING
    points += f"; and {more} more, which table.csv names" if more > 0 else ""
    return f'<p class="missing"><b>Not in this report:</b> {html.escape(points)}.</p>'


def _unbalanced(summary: Summary) -> str:
    """Which trainings ended with a group that is silent or does almost everything."""
    found = [row for row in summary.rows if row.imbalance]
    if not found:
        return ""
    named = "; ".join(f"{row.point.name}: {row.imbalance}" for row in found[:MOST_MISSING])
    more = f"; and {len(found) - MOST_MISSING} more" if len(found) > MOST_MISSING else ""
    count = f"In {len(found)} of {len(summary.rows)} trainings a group of latents fell silent or took over:"
    return f'<p class="missing"><b>{count}</b> {html.escape(named + more)}.</p>'


def _interval_note(summary: Summary) -> str:
    if summary.seeds > 1:
        text = f"± is the 95 % interval of the mean over up to {summary.seeds} seeds (Student's t)."
    else:
        text = "One seed: ± is the 95 % interval over held-out documents of that run; it says nothing about seeds."
    return f"{text} Smoothness: lower is smoother. CE recovered: 1 is the untouched language model."


def _summary_table(summary: Summary) -> str:
    """Groups as rows; measures of one family stand under a common head."""
    keys = list(dict.fromkeys(key for group in summary.groups for key in group.axes))
    short = short_names(keys)
    measures = [name for name in LABELS if name in summary.measures]
    several = summary.seeds > 1
    head = "".join(f'<th class="key" rowspan="2">{_words(short[key])}</th>' for key in keys)
    head += '<th rowspan="2">seeds</th>' if several else ""
    members = ""
    for family, members_of in itertools.groupby(measures, key=lambda name: LABELS[name][0]):
        names = [LABELS[name][1] for name in members_of]
        alone = names == [""]
        head += f"<th{' rowspan=2' if alone else f' colspan={len(names)} class=family'}>{html.escape(family)}</th>"
        members += "" if alone else "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = ""
    for group in summary.groups:
        cells = "".join(f'<td class="key">{html.escape(shown(group.value(key)))}</td>' for key in keys)
        cells += f"<td>{sum(not row.missing for row in group.rows)}</td>" if several else ""
        cells += "".join(f"<td>{_cell(group, name)}</td>" for name in measures)
        body += f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{head}</tr><tr>{members}</tr></thead><tbody>{body}</tbody></table>"


def _cell(group: Group, measure: str) -> str:
    mean, half = group.interval(measure)
    if half != half:
        return figures(mean, 3)
    # As many decimals as the value deserves, and enough to show the first digit of its interval.
    # What is left of a difference of equal numbers is rounding.
    first_digit = -math.floor(math.log10(half)) if half > 1e-9 * abs(mean) else 0
    decimals = min(max(len(figures(mean, 3).partition(".")[2]), first_digit), 5)
    return f"{mean:.{decimals}f}<small>± {half:.{decimals}f}</small>"


def _words(name: str) -> str:
    return html.escape(name.replace("_", " "))


def _comparisons(found: list[Comparison]) -> str:
    """Differences seed by seed; bold where the interval leaves out zero."""
    if not found:
        return ""
    measures = list(dict.fromkeys(name for entry in found for name in entry.differences))
    seeds = max(values[2] for entry in found for values in entry.differences.values())
    head = "".join(f"<th>{html.escape(label(name))}</th>" for name in measures)
    body = ""
    for entry in found:
        keys = list(dict.fromkeys([*entry.group.axes, *entry.reference.axes]))
        differing = [key for key in keys if shown(entry.group.value(key)) != shown(entry.reference.value(key))]
        shared = [key for key in entry.group.axes if key not in differing]
        names = short_names(keys)
        change = ", ".join(
            f"{names[key].replace('_', ' ')} {shown(entry.group.value(key))} − {shown(entry.reference.value(key))}"
            for key in differing
        )
        where = ", ".join(f"{names[key].replace('_', ' ')} {shown(entry.group.value(key))}" for key in shared)
        cells = "".join(f"<td>{_difference(entry.differences.get(name))}</td>" for name in measures)
        body += f'<tr><td class="key">{html.escape(change)}<small>{html.escape(where)}</small></td>{cells}</tr>'
    return (
        "<h2>Differences, seed by seed</h2>"
        f'<div class="wide{" tall" if len(found) > LONG_TABLE else ""}"><table><thead><tr><th class="key">difference</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">Mean difference between points of the same seed over up to {seeds} seeds, ± its 95 % interval '
        "(Student's t); bold where the interval leaves out zero. No correction for the number of comparisons.</p>"
    )


def _difference(values: tuple[float, float, int] | None) -> str:
    if values is None:
        return "–"
    mean, half, _ = values
    text = f"{mean:+.3f}<small>± {half:.3f}</small>"
    return f"<b>{text}</b>" if abs(mean) > half else text


def _figure(chart: Chart, path: Path, charts: int) -> str:
    image, width, _ = picture(path, chart.title)
    panels = ' class="panels"' if width > WIDE or charts == 1 else ""
    return f"<figure{panels}>{image}<figcaption>{html.escape(chart.caption)}</figcaption></figure>"


def _every_measure(summary: Summary) -> str:
    rows = [row for row in summary.rows if not row.missing]
    if not rows:
        return "<p>No point has results yet.</p>"
    if len(rows) > MOST_COLUMNS:
        return f"<p>{len(rows)} points have {len(summary.measures)} measures each: they are in table.csv beside this page.</p>"
    axes = short_names([key for row in rows for key in row.point.axes])
    head = "".join(
        f"<tr><th>{_words(name)}</th>"
        + "".join(f"<th>{html.escape(shown(row.point.value(key)))}</th>" for row in rows)
        + "</tr>"
        for key, name in axes.items()
    )
    body = "".join(
        f"<tr><th><code>{html.escape(name)}</code></th>"
        + "".join(f"<td>{figures(row.values.get(name, float('nan')))}</td>" for row in rows)
        + "</tr>"
        for name in summary.measures
    )
    return f'<table class="every"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _settings(summary: Summary) -> str:
    compared = summary.compared
    file, common = compared.origin.read_text(encoding="utf-8"), yaml.safe_dump(compared.common, sort_keys=False)
    return (
        f"<p>Made from <code>{html.escape(str(compared.origin))}</code>:</p><pre>{html.escape(file)}</pre>"
        f"<details><summary>What all points share</summary><pre>{html.escape(common)}</pre></details>"
    )
