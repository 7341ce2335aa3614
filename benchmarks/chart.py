"""Line charts as SVG text: panels side by side, the same lines in each, a legend below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_PANEL_WIDTH, _PANEL_HEIGHT = 440, 300
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 44, 16, 48
_LEGEND_LINE_HEIGHT = 20
_NUM_GRID_LINES = 5
# Distinct to most colour-blind readers too (Okabe and Ito 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True, slots=True)
class Panel:
    """Attributes:
    lines: By name, points `(x, y)` in the order of x, which is above 0.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[Panel], x_title: str) -> str:
    """The x axis is logarithmic with a mark at each x there is; the y axes start at 0."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)}
    width, height = _PANEL_WIDTH * len(panels), _PANEL_HEIGHT + _LEGEND_LINE_HEIGHT * len(names) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        parts += [
            f'<g transform="translate({place * _PANEL_WIDTH} 0)">',
            *_panel(panel, x_title, colours),
            "</g>",
        ]
    parts += [_legend_entry(place, name, colours[name]) for place, name in enumerate(names)]
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, x_title: str, colours: Mapping[str, str]) -> list[str]:
    xs = sorted({x for points in panel.lines.values() for x, _ in points})
    top = _round_up(max(y for points in panel.lines.values() for _, y in points))
    parts = [_text(_PANEL_WIDTH / 2, 22, panel.title, "middle", weight="bold")]
    for number in range(_NUM_GRID_LINES + 1):
        value = top * number / _NUM_GRID_LINES
        y = _y_place(value, top)
        parts.append(_line(_LEFT, y, _PANEL_WIDTH - _RIGHT, y, "#dddddd"))
        parts.append(_text(_LEFT - 6, y + 4, f"{value:g}", "end"))
    for x in xs:
        parts.append(_text(_x_place(x, xs), _PANEL_HEIGHT - _BOTTOM + 16, f"{x:g}", "middle"))
    parts.append(_text((_LEFT + _PANEL_WIDTH - _RIGHT) / 2, _PANEL_HEIGHT - 12, x_title, "middle"))
    for name, points in panel.lines.items():
        places = [(_x_place(x, xs), _y_place(y, top)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>' for x, y in places]
    return parts


def _x_place(x: float, xs: Sequence[float]) -> float:
    span = math.log(xs[-1] / xs[0]) or 1.0
    return _LEFT + 12 + (_PANEL_WIDTH - _LEFT - _RIGHT - 24) * math.log(x / xs[0]) / span


def _y_place(y: float, top: float) -> float:
    return _PANEL_HEIGHT - _BOTTOM - (_PANEL_HEIGHT - _TOP - _BOTTOM) * y / top


def _round_up(value: float) -> float:
    """To 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 2.5, 5, 10) if value <= step * power)


def _legend_entry(place: int, name: str, colour: str) -> str:
    y = _PANEL_HEIGHT + _LEGEND_LINE_HEIGHT * place + 4
    return _line(_LEFT, y, _LEFT + 24, y, colour, width=2) + _text(_LEFT + 32, y + 4, name, "start")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
