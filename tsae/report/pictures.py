"""Pictures inside a page: as data, so that the page needs no other file."""

from __future__ import annotations

import base64
import html
import os
import urllib.parse
from pathlib import Path

from tsae.experiments.driver import draw_again, files_of
from tsae.experiments.registry import EXPERIMENTS
from tsae.report.summary import Summary

MOST_BYTES = 24_000_000
"""Pictures of experiments that a page carries; beyond that it tells where they are."""


def picture(path: Path, title: str) -> tuple[str, int, int]:
    """An image element at half its pixels, and width and height of the picture."""
    content = path.read_bytes()
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    data = base64.b64encode(content).decode()
    element = f'<img src="data:image/png;base64,{data}" width="{width // 2}" height="{height // 2}" alt="{html.escape(title)}">'
    return element, width, height


def experiments_section(summary: Summary) -> str:
    """The experiments' own figures, one fold for each experiment, points below each other; empty without any."""
    folds, room, folder = [], MOST_BYTES, summary.compared.folder
    for name, experiment in EXPERIMENTS.items():
        found = [
            (row.point.name, path)
            for row, run in zip(summary.rows, summary.compared.runs, strict=True)
            for path in files_of(run, row.point.config, name)
            if path.with_suffix(".png").exists()
        ]
        if not found:
            continue
        parts = []
        for point, path in found:
            if experiment.compared:
                draw_again(name, path)
            drawn, title = path.with_suffix(".png"), f"{point}: {path.stem}"
            room -= drawn.stat().st_size
            shown = picture(drawn, title)[0] if room > 0 else f"<code>{html.escape(str(drawn))}</code>"
            parts.append(
                f'<figure class="panels">{shown}<figcaption>{_titled(title, path, folder)}</figcaption></figure>'
            )
        folds.append(f"<details><summary>{html.escape(experiment.help)}</summary>{''.join(parts)}</details>")
    return "<h2>Experiments</h2>" + "".join(folds) if folds else ""


def _titled(title: str, path: Path, folder: Path) -> str:
    """The title of a result, with a link from `folder` to the page that lies beside the result, if there is one."""
    page = path.with_suffix(".html")
    if not page.exists():
        return html.escape(title)
    address = urllib.parse.quote(os.path.relpath(page, folder))
    return f'{html.escape(title)} (<a href="{address}">interactive page</a>)'
