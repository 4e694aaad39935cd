"""Charts as IMAGE."""

from collections.abc import Mapping, Sequence
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


def bar_chart(panels: Mapping[str, Sequence[float]], names: Sequence[str]) -> Tensor:
    """A row of bars for each panel, one bar for each name: (1, height, 768, 3) in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = INCHES[0], 0.4 + 0.25 * len(names)
    figure = Figure((width, max(1.0, height * len(panels))), DPI, layout="constrained")
    for place, (title, values) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(max(1, len(panels)), 1, place, title=title)
        axes.title.set_fontsize(9)
        bars = axes.barh(names, values, color=[f"C{k}" for k in range(len(names))])
        axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.tick_params(labelsize=8)
    return _pixels(FigureCanvasAgg(figure))


def slider(source: Tensor, edits: Sequence[Tensor]) -> Tensor:
    """(F, H, n W, 3): each edit with the source left of a line that sweeps over the picture as the clip plays."""
    frames, _, width, _ = source.shape
    views = [edit.clone() for edit in edits]
    for i in range(frames):
        at = round((i + 1) / (frames + 1) * width)
        for view in views:
            view[i, :, :at] = source[i, :, :at]
            view[i, :, max(0, at - 1) : at] = 1.0
    return torch.cat(views, 2)


def tracks_over(images: Tensor, tracks: Tensor, seen: Tensor) -> Tensor:
    """Images (F, H, W, 3) with tracks (N, F, 2) that are `seen` (N, F): each point, and the way that it came."""
    import numpy as np
    from PIL import Image, ImageDraw

    hues = torch.linspace(0, 1, len(tracks) + 1)[:-1].mul(255).int().tolist()
    colours = [Image.new("HSV", (1, 1), (hue, 220, 255)).convert("RGB").getpixel((0, 0)) for hue in hues]
    radius, drawn = max(1, min(images.shape[1:3]) // 128), []
    for i, image in enumerate(images):
        picture = Image.fromarray((image * 255).round().byte().cpu().numpy())
        pen = ImageDraw.Draw(picture)
        for track, visible, colour in zip(tracks, seen, colours, strict=True):
            if not visible[i]:
                continue
            way = [tuple(point) for point in track[: i + 1].tolist()]
            if len(way) > 1:
                pen.line(way, colour, radius)
            x, y = way[-1]
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
        drawn.append(torch.from_numpy(np.array(picture)).float() / 255)
    return torch.stack(drawn)


def table_chart(cells: Sequence[Sequence[str]], heads: Sequence[str], bold: Mapping[int, int] | None = None) -> Tensor:
    """A table of text, one row each, as wide as it needs: (1, height, width, 3) in [0, 1].

    bold: by row the column that stands out.
    """
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
    for row, column in (bold or {}).items():
        table[row + 1, column].set_text_props(weight="bold")
    return _pixels(FigureCanvasAgg(figure))


def _pixels(canvas) -> Tensor:
    """What a canvas of matplotlib's shows: (1, H, W, 3)."""
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(1, height, width, 4)[..., :3].float() / 255
