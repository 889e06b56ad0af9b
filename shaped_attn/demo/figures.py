"""Pictures of the demo's page: line charts as inline SVG, matrices as PNG in a data URI.

Colours of the charts are variables of the page's style sheet, and the matrices have a transparent
zero, so that both follow the reader's light or dark theme.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 46

POSITIVE_RGB, NEGATIVE_RGB = (31, 119, 205), (214, 69, 65)


@dataclass(frozen=True)
class Line:
    """A curve. ``color`` is the name of a variable of the style sheet.

    With ``joined=False`` its points are markers alone.
    """

    points: Sequence[tuple[float, float]]
    color: str
    width: float = 2.0
    opacity: float = 1.0
    dashed: bool = False
    markers: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Band:
    """The area between two curves, given as (x, lower y, upper y)."""

    points: Sequence[tuple[float, float, float]]
    color: str
    opacity: float = 0.2


@dataclass(frozen=True)
class Level:
    """A horizontal line with a label on it, at its right end or its left."""

    value: float
    label: str
    at_left: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    bands: Sequence[Band] = (),
    x_log: bool = False,
    y_log: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Draw lines over common axes as one ``<svg>`` element; ``title`` is its accessible name.

    Bands lie below all lines.
    """
    xs = [x for line in lines for x, _ in line.points]
    xs += [x for band in bands for x, _, _ in band.points]
    ys = [y for line in lines for _, y in line.points] + [level.value for level in levels]
    ys += [y for band in bands for _, *edges in band.points for y in edges]
    ys = [y for y in ys if math.isfinite(y)] or [0.5, 1.0]  # a run may have diverged at once
    x_axis = _Axis(min(xs), max(xs), x_log, _LEFT, _WIDTH - _RIGHT)
    low, high = y_range or _padded(min(ys), max(ys), y_log)
    y_axis = _Axis(low, high, y_log, _HEIGHT - _BOTTOM, _TOP)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="chart">',
        f"<title>{html.escape(title)}</title>",
    ]
    for value, text in y_axis.ticks():
        y = y_axis(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for value, text in x_axis.ticks():
        x = x_axis(value)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{text}</text>'
        )
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="{middle_x}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    parts.extend(_draw_band(band, x_axis, y_axis, low, high) for band in bands)
    for level in levels:
        if low <= level.value <= high:
            y = y_axis(level.value)
            x, anchor = (_LEFT + 4, "start") if level.at_left else (_WIDTH - _RIGHT - 4, "end")
            parts.append(
                f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{x}" y="{y - 5:.1f}" text-anchor="{anchor}">'
                f"{html.escape(level.label)}</text>"
            )
    parts.extend(_draw(line, x_axis, y_axis, low, high) for line in lines)
    parts.append("</svg>")
    return "".join(parts)


def _draw(line: Line, x_axis: _Axis, y_axis: _Axis, low: float, high: float) -> str:
    # Outside the range a curve runs along the frame instead of over the labels.
    points = [
        (x_axis(x), y_axis(min(max(y, low), high))) for x, y in line.points if math.isfinite(y)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="6 5"' if line.dashed else ""
    drawn = ""
    if line.joined:
        drawn = (
            f'<polyline points="{path}" fill="none" stroke="var(--{line.color})" '
            f'stroke-width="{line.width}" stroke-opacity="{line.opacity}" '
            f'stroke-linejoin="round"{dash}/>'
        )
    if line.markers or not line.joined:
        drawn += "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="var(--{line.color})"/>'
            for x, y in points
        )
    return drawn


def _draw_band(band: Band, x_axis: _Axis, y_axis: _Axis, low: float, high: float) -> str:
    kept = [
        (x, min(max(lower, low), high), min(max(upper, low), high))
        for x, lower, upper in band.points
        if math.isfinite(lower) and math.isfinite(upper)
    ]
    outline = [(x, upper) for x, _, upper in kept] + [(x, lower) for x, lower, _ in reversed(kept)]
    path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in outline)
    return f'<polygon points="{path}" fill="var(--{band.color})" fill-opacity="{band.opacity}"/>'


def _padded(low: float, high: float, is_log: bool) -> tuple[float, float]:
    if is_log:
        return low / 1.6, high * 1.6
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


class _Axis:
    """Maps a range of numbers to a range of the picture, and knows good places for ticks."""

    def __init__(self, low: float, high: float, is_log: bool, start: float, stop: float) -> None:
        if low == high:
            low, high = (low / 2, high * 2) if is_log else (low - 1, high + 1)
        self.low, self.high, self.is_log = low, high, is_log
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        if self.is_log:
            value, low, high = (math.log(x) for x in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        if self.is_log:
            first = math.ceil(math.log10(self.low) - 1e-9)
            last = math.floor(math.log10(self.high) + 1e-9)
            stride = 1 + (last - first) // 6
            return [(10.0**n, _power_of_ten(n)) for n in range(first, last + 1, stride)]
        rough = (self.high - self.low) / 5
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
        count = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [(n * step, f"{n * step:.6g}") for n in count]


def _power_of_ten(exponent: int) -> str:
    if -2 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return f'10<tspan dy="-5" font-size="9">{exponent}</tspan>'


def smooth(values: Sequence[float], window: int) -> list[tuple[float, float]]:
    """Running mean over the last ``window`` values, as (step counted from 1, mean)."""
    total = np.cumsum(np.concatenate(([0.0], np.asarray(values, dtype=float))))
    stop = np.arange(1, len(values) + 1)
    begin = np.maximum(stop - window, 0)
    means = (total[stop] - total[begin]) / (stop - begin)
    return list(zip(stop.tolist(), means.tolist(), strict=True))


def matrix_image(matrix: Tensor) -> str:
    """Draw an attention matrix as a PNG data URI, one pixel per entry.

    Blue is positive, red negative; the opacity is the square root of the magnitude, full from 1 on.
    """
    from matplotlib.image import imsave

    values = matrix.detach().cpu().float().numpy()
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where((values >= 0)[..., None], POSITIVE_RGB, NEGATIVE_RGB)
    magnitude = np.nan_to_num(np.abs(values), nan=0.0, posinf=1.0)
    pixels[..., 3] = np.round(255 * np.sqrt(np.clip(magnitude, 0, 1)))
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
