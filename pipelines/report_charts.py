"""Drawings for the report as inline SVG: curves and the graph of stages. No script, no font, no network.

Colors come from the page (CSS classes and `currentColor`), so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 340, 172
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24  # room for the axes' numbers
MOST_POINTS = 240
MOST_HOVERS = 48
SMOOTH_FROM, NOISE = 30, 0.01  # points, and share of the axis: shorter or calmer curves are shown as they are

Point = tuple[float, float | None]


class Curve(NamedTuple):
    label: str
    points: Sequence[Point]
    """(step, value) in the order of steps; None where there was no finite value, which leaves a gap."""


class Node(NamedTuple):
    name: str
    kind: str
    note: str
    done: bool


class Edge(NamedTuple):
    start: str
    end: str
    teaches: bool
    """A teacher or an averaged model (dashed), and not the weights to start from."""


def line_chart(curve: Curve) -> str:
    """One curve with axes, ticks and values on hovering; a noisy one is thin, with a thick running mean."""
    points = _thin_out(curve.points)
    known = [(x, y) for x, y in points if y is not None]
    if not known:
        return '<p class="missing">no finite value</p>'
    first, last = known[0][0], known[-1][0]
    y_ticks = nice_ticks(min(y for _, y in known), max(y for _, y in known), 4)
    x_ticks = [tick for tick in nice_ticks(first, last, 5) if first <= tick <= last] or [first]
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if last == first else (x - first) / (last - first)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    few = ' class="few"' if len(known) < SMOOTH_FROM else ""  # with their dots shown
    parts = [f'<svg{few} viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(curve.label)}">']
    for tick, text in zip(y_ticks, _tick_texts(y_ticks), strict=True):
        y = place(first, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick, text in zip(x_ticks, _tick_texts(x_ticks), strict=True):
        x = place(tick, low)[0]
        end = "end" if x > WIDTH - 24 else "middle"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - 20}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{end}">{text}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    mean = running_mean(known, len(known) // 20)
    noise = sum(abs(y - smooth) for (_, y), (_, smooth) in zip(known, mean, strict=True)) / len(known)
    noisy = len(known) >= SMOOTH_FROM and noise > NOISE * (high - low)
    parts.append(_path(points, place, "raw" if noisy else "curve"))
    if noisy:
        parts.append(_path(mean, place, "curve"))
    parts += _hovers(curve.label, known, place)
    return "".join([*parts, "</svg>"])


def _path(points: Sequence[Point], place, style: str) -> str:
    """A line through the points; a gap where a value is missing, and a dot for a point that stands alone."""
    pieces: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append("{:.1f},{:.1f}".format(*place(x, y)))
    drawn = "".join(
        f"M{piece[0]}" + ("h0" if len(piece) == 1 else "L" + " ".join(piece[1:])) for piece in pieces if piece
    )
    return f'<path class="{style}" d="{drawn}"/>'


def _hovers(label: str, known: Sequence[tuple[float, float]], place) -> list[str]:
    """Invisible columns, each with a dot and a title: what a pointer over the curve shows."""
    stride = math.ceil(len(known) / MOST_HOVERS)
    shown = known[::stride]
    xs = [place(x, y)[0] for x, y in shown]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(xs)), WIDTH - RIGHT]
    parts = []
    for (x, y), (start, end) in zip(shown, pairwise(edges), strict=True):
        px, py = place(x, y)
        parts.append(
            f'<g class="hover"><title>step {x:g}: {escape(label)} {y:.5g}</title>'
            f'<rect x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3"/></g>'
        )
    return parts


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in steps of 1, 2 or 5 times a power of ten that enclose `low` and `high`."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [index * step for index in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """As many digits as tell the ticks apart, no more."""
    largest = max(abs(tick) for tick in ticks)
    if largest >= 1e5 or 0 < largest < 1e-3:
        return [
            "0" if tick == 0 else f"{tick:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
            for tick in ticks
        ]
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick + 0.0:.{digits}f}".replace("-", "−") for tick in ticks]


def running_mean(points: Sequence[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    """Each point's mean with up to `reach` neighbors on either side, as many on both but at the ends."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means: list[tuple[float, float]] = []
    for index, (x, _) in enumerate(points):
        near = max(2, min(reach, index, len(points) - 1 - index))
        start, end = max(0, index - near), min(len(points), index + near + 1)
        means.append((x, (sums[end] - sums[start]) / (end - start)))
    return means


def _thin_out(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS: neighbors become their mean."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return list(points)
    thin: list[Point] = []
    for start in range(0, len(points), size):
        bunch = [(x, y) for x, y in points[start : start + size] if y is not None]
        middle = points[start][0] if not bunch else bunch[len(bunch) // 2][0]
        thin.append((middle, sum(y for _, y in bunch) / len(bunch) if bunch else None))
    return thin


BOX, BOX_HEIGHT, ACROSS, DOWN = 148, 46, 72, 22


def stage_graph(nodes: Sequence[Node], edges: Sequence[Edge]) -> str:
    """The stages from left to right, each right of all that it needs; "" where there is nothing to draw.

    Nodes come with their inputs before them; edges name nodes.
    """
    if not nodes:
        return ""
    column: dict[str, int] = {}
    for node in nodes:
        column[node.name] = max((column[edge.start] + 1 for edge in edges if edge.end == node.name), default=0)
    columns = [[node for node in nodes if column[node.name] == index] for index in range(max(column.values()) + 1)]
    place: dict[str, tuple[float, float]] = {}
    for index, members in enumerate(columns):
        wanted = {
            node.name: _middle(place, [edge.start for edge in edges if edge.end == node.name]) for node in members
        }
        place |= _stack(wanted, index * (BOX + ACROSS))
    roots = {node.name: _middle(place, [edge.end for edge in edges if edge.start == node.name]) for node in columns[0]}
    place |= _stack(roots, 0)
    height = max(y for _, y in place.values()) + BOX_HEIGHT
    width = len(columns) * (BOX + ACROSS) - ACROSS
    parts = [
        f'<svg class="graph" viewBox="-2 -2 {width + 4} {height + 4}" role="img" aria-label="the stages" '
        f'style="min-width: {width * 0.72:.0f}px; max-width: {width}px">'
    ]
    parts += [_edge(edge, place) for edge in edges]
    parts += [_node(node, *place[node.name]) for node in nodes]
    return "".join([*parts, "</svg>"])


def _middle(place: Mapping[str, tuple[float, float]], names: Sequence[str]) -> float:
    return sum(place[name][1] for name in names) / len(names) if names else 0.0


def _stack(wanted: Mapping[str, float], x: float) -> dict[str, tuple[float, float]]:
    """Each node at the height of what it hangs on, pushed down where another is in its place."""
    place, free = {}, 0.0
    for name in sorted(wanted, key=wanted.__getitem__):
        place[name] = x, max(free, wanted[name])
        free = place[name][1] + BOX_HEIGHT + DOWN
    return place


def _edge(edge: Edge, place: Mapping[str, tuple[float, float]]) -> str:
    x0, y0 = place[edge.start][0] + BOX, place[edge.start][1] + BOX_HEIGHT / 2
    x1, y1 = place[edge.end][0], place[edge.end][1] + BOX_HEIGHT / 2
    bend = ACROSS * 0.6
    style = "edge teaches" if edge.teaches else "edge"
    return (
        f'<path class="{style}" d="M{x0:.0f},{y0:.0f} C{x0 + bend:.0f},{y0:.0f} '
        f'{x1 - bend:.0f},{y1:.0f} {x1 - 5:.0f},{y1:.0f}"/>'
        f'<path class="tip" d="M{x1 - 7:.0f},{y1 - 4:.0f} L{x1:.0f},{y1:.0f} L{x1 - 7:.0f},{y1 + 4:.0f} Z"/>'
    )


def _node(node: Node, x: float, y: float) -> str:
    name = node.name if len(node.name) <= 19 else node.name[:18] + "…"
    return (
        f'<g class="node kind-{escape(node.kind)}{"" if node.done else " waiting"}">'
        f"<title>{escape(node.name)}</title>"
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{BOX_HEIGHT}" rx="9"/>'
        f'<text class="name" x="{x + 13:.0f}" y="{y + 20:.0f}">{escape(name)}</text>'
        f'<text class="note" x="{x + 13:.0f}" y="{y + 36:.0f}">{escape(node.note)}</text></g>'
    )
