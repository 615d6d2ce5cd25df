"""Figures as PNG, SVG or PDF files. No window, no network."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from ray_surgeon import storage

FORMATS = ("png", "svg", "pdf")

_MARKERS = "osD^vP*X<>"

_HIGHEST = 8.0
"""Times the dense perplexity: what lies above it has collapsed, and would press all the rest into one line."""


def save(figure: Figure, uri: str) -> None:
    """Write a figure, in the format that the name ends in.

    Raises:
        ValueError: the name ends in no known format.
    """
    suffix = uri.rpartition(".")[2].lower()
    if suffix not in FORMATS:
        raise ValueError(f"cannot plot to {uri}: the name must end in .{', .'.join(FORMATS)}")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"figure.{suffix}"
        figure.savefig(file, dpi=150)
        storage.put_file(uri, file)


def perplexity_figure(records: Sequence[Mapping[str, Any]], text: str) -> Figure:
    """Plot perplexity against sparsity, one line a run, with the dense model at zero; lines that leave the plot say how far.

    Args:
        records: contents of report.json.
        text: name of the evaluation text; runs without it are left out.
    """
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    highest = _HIGHEST * max((r["dense"]["perplexity"][text] for r in records if text in r["dense"]["perplexity"]), default=1.0)
    top, bottom = 1.0, math.inf
    for number, record in enumerate(r for r in records if text in r["dense"]["perplexity"]):
        points = [(0.0, record["dense"]["perplexity"][text])]
        points += [(100 * shot["sparsity"], shot["perplexity"][text]) for shot in record["shots"]]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        marker = _MARKERS[number % len(_MARKERS)]
        most = max(y for _, y in points)
        label = str(record["spec"]["name"]) + (f" (up to {most:.3g})" if most > highest else "")
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.4, label=label)
        top = max(top, 1.5 * points[0][1], *(y for _, y in points if y <= highest))
        bottom = min(bottom, points[0][1], *(y for _, y in points))
        axes.axhline(points[0][1], color="0.7", linewidth=0.6, linestyle="--", zorder=0)
    axes.set_yscale("log")
    if math.isfinite(bottom):
        axes.set_ylim(0.95 * bottom, 1.1 * top)
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.set_xlabel("sparsity of the blocks' linears, %")
    axes.set_ylabel(f"perplexity on {text}")
    axes.grid(which="both", color="0.9", linewidth=0.5)
    axes.legend(fontsize=7, frameon=False)
    return figure


def error_figure(errors: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Plot the error of approximations of the Fisher against the number of Kronecker terms.

    Args:
        errors: linear -> way to find terms -> relative error with 1, 2, ... terms.
    """
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, (linear, ways) in enumerate(errors.items()):
        for style, (way, values) in zip(("-", ":"), ways.items(), strict=False):
            places = range(1, len(values) + 1)
            axes.plot(places, values, style, color=f"C{number % 10}", marker=_MARKERS[number % len(_MARKERS)], label=f"{linear}, {way}")
    axes.set_xlabel("Kronecker terms")
    axes.set_ylabel("relative error of a dense block of the Fisher")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9", linewidth=0.5)
    axes.legend(fontsize=7, frameon=False)
    return figure
