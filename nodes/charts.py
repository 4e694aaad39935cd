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
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(1, height, width, 4)[..., :3].float() / 255
