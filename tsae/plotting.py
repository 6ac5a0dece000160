"""The figures' common look: colours that survive colour-blindness and grey print, one typeface, few lines of ink."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tsae.runtime import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
"""Categorical colours (Okabe and Ito's set without the yellow that vanishes on white)."""

MADE_FROM = "made_from"
"""Key of a PNG's text."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One marker for each colour, so that series stay apart without it."""

SPLITS = ("high-level", "low-level", "all latents")
"""What has the first colours and markers wherever splits are compared."""

PRINT = ("pdf", "svg")
"""What a figure for a paper is also saved as, a panel as wide as a column."""

STYLE: Any = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.07,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "tsae",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


@contextmanager
def figure(
    path: str | Path,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] | None = None,
    also: Sequence[str] = (),
    made_from: str = "",
    **subplots: Any,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the common look and its axes in reading order, saved to `path` (whole or not at all) on leaving.

    `size` is in inches, by default 3.3 x 2.6 for each panel; `also` names further formats, saved beside it; `made_from`,
    which tells what is drawn from other things, is kept inside a PNG; `subplots` goes to `Figure.subplots`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=size or (3.3 * columns, 2.6 * rows), layout="constrained")
        grid = drawn.subplots(rows, columns, squeeze=False, **subplots)
        yield drawn, [axes for row in grid for axes in row]
        if also:  # The layout takes most of the time, and holds for all formats.
            drawn.draw_without_rendering()
            drawn.set_layout_engine("none")
        for suffix in (Path(path).suffix.lstrip("."), *also):
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
            save = partial(drawn.savefig, format=suffix, metadata=undated)
            if suffix == "png":
                save = partial(_save_few_colours, drawn, made_from)
            files.write_atomically(Path(path).with_suffix(f".{suffix}"), save)


def _save_few_colours(drawn: Figure, made_from: str, stream: BinaryIO) -> None:
    """A PNG of 256 colours, which look the same and need a third of the bytes: a report carries many of them."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    whole, about = io.BytesIO(), PngInfo()
    drawn.savefig(whole, format="png")
    about.add_text(MADE_FROM, made_from)
    picture = Image.open(whole).convert("RGB")
    few = picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(stream, "png", pnginfo=about, dpi=(STYLE["savefig.dpi"],) * 2)


def made_from(path: str | Path) -> str:
    """What `figure` was told that the PNG at `path` is made from; nothing of a picture that is not there or not whole."""
    from PIL import Image

    with suppress(OSError), Image.open(path) as picture:
        return str(picture.info.get(MADE_FROM, ""))
    return ""


def draw_interval(
    axes: Axes,
    x: Sequence[float],
    mean: Sequence[float],
    half_width: Sequence[float],
    *,
    series: int = 0,
    label: str | None = None,
    connected: bool = True,
) -> None:
    """Means with 95 % intervals as bars, joined by a line if `connected`; `series` picks colour and marker.

    NaN as a mean leaves a gap, as a half-width draws no bar.
    """
    colour, marker = PALETTE[series % len(PALETTE)], MARKERS[series % len(MARKERS)]
    axes.errorbar(
        list(x),
        list(mean),
        yerr=[0.0 if width != width else width for width in half_width],
        color=colour,
        linestyle="-" if connected else "none",
        marker=marker,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=1.1,
        capsize=2.5,
        label=label,
    )
