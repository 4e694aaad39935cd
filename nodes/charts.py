"""Charts as IMAGE."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INCHES, DPI = (8.0, 4.5), 96


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y) and its name in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> Tensor:
    """Curves over common axes: (1, 432, 768, 3) in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(INCHES, DPI, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    for line in lines:
        axes.plot(line.x, line.y, marker=".", label=line.name)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    return _pixels(FigureCanvasAgg(figure))


def table_chart(cells: Sequence[Sequence[str]], heads: Sequence[str]) -> Tensor:
    """A table of text, one row each, as wide as it needs: (1, height, width, 3) in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widths = [max(len(row[i]) for row in (*cells, heads)) + 2 for i in range(len(heads))]
    figure = Figure((0.085 * sum(widths), 0.3 * (len(cells) + 1)), DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    shares = [width / sum(widths) for width in widths]
    table = axes.table(cells, colLabels=heads, colWidths=shares, cellLoc="left", colLoc="left", bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("0.85")
        cell.set_facecolor("0.92" if row == 0 else "white")
    return _pixels(FigureCanvasAgg(figure))


def _pixels(canvas) -> Tensor:
    """What a canvas of matplotlib's shows: (1, H, W, 3)."""
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(1, height, width, 4)[..., :3].float() / 255
