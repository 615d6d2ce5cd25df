"""Figures as PNG, SVG or PDF files, or as SVG inside a page. No window, no network."""

from __future__ import annotations

import io
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator
from numpy.typing import ArrayLike

from ray_surgeon.report.findings import (
    bytes_at,
    duration,
    faster,
    loss_curve,
    measured_increases,
    phases,
    speed_words,
    widths_of,
)
from ray_surgeon.report.record import (
    has_generation,
    shots_by_size,
    size_name,
    sizes_of,
    structure_of,
    texts_of,
)
from ray_surgeon.storage import files

Records = Sequence[Mapping[str, Any]]
"""Contents of report.json, or entries of one."""

_MARKERS = "osD^vP*X<>"
_INK = "#010101"
"""Colour that a page replaces by the colour of its text, see plots.mplstyle."""
_SOFT: dict[str, Any] = {"color": "#808080", "alpha": 0.3, "linewidth": 0.5}
_WIDTH = 4.6
"""Inches of a figure; small, so that its text can be read on a phone."""
_LOSS_PARTS = 24
"""Parts of a training whose mean losses are drawn."""
_LEAST_POINTS = 3
"""Points from which on a line is drawn through them."""
_LINEAR_UP_TO = 4.0
"""Ratio of perplexities up to which their axis is linear."""
_STEP_COLORS = (
    "#4c8bd6",
    "#e4743a",
    "#3fa66b",
    "#b565c9",
    "#c9a227",
    "#d6516e",
    "#3aa6a6",
    "#8a8a8a",
    "#7a6ad8",
    "#9c6b3f",
)
_HIGHEST = 8.0
"""Largest drawn perplexity, as a multiple of the dense model's.

Models above it have collapsed, and would compress all other values into one line.
"""


_styled = rc_context(fname=Path(__file__).with_name("plots.mplstyle"))


def save(figure: Figure, uri: str) -> None:
    """Write a figure, in the format of the name's ending.

    Raises:
        ValueError: matplotlib does not know the format.
    """
    with files.replacing(uri) as file:
        figure.savefig(file, format=uri.rpartition(".")[2], dpi=150, facecolor="white")


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element that takes the colour of the text around it.

    Args:
        figure: to draw.
        name: distinguishes its identifiers from those of other figures of a page.
    """
    buffer = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    name = re.sub("[^A-Za-z0-9-]", "-", name)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    figure.set_layout_engine("none")  # another format need not lay it out again
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"\b(id=\"|url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    return re.sub(r'width="[^"]*" height="[^"]*"', "", svg, count=1)


def _axes(x_label: str, y_label: str, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def _points(record: Mapping[str, Any], text: str | None) -> list[tuple[float, float]]:
    """Return sparsity and quality of the dense model and after every shot; see `quality_figure`."""
    dense = {**record["dense"], "sparsity": 0.0, "generation": {"acceptance": 1.0}}
    points = []
    for state in (dense, *record["shots"]):
        if text is None:
            generation = state.get("generation") or {}
            quality = 100 * generation.get("acceptance", math.inf)
        else:
            quality = state["perplexity"].get(text, math.inf)
        if math.isfinite(quality):
            points.append((100 * state["sparsity"], quality))
    return points


@_styled
def quality_figure(records: Records, text: str | None) -> Figure:
    """Plot a measure against sparsity, with the dense model at zero.

    A run has a line if there are three points or more. The measure begins at zero, unless
    perplexities differ so much that they need a logarithm. Runs that were not measured are left
    out.

    Args:
        records: contents of report.json.
        text: whose perplexity is plotted; None for the agreement with the original.
    """
    label = "agreement with the original, %" if text is None else f"perplexity on {text}"
    figure, axes = _axes("removed weights of the blocks, %", label)
    lowest = math.inf
    highest = 0.0
    for number, record in enumerate(records):
        points = _points(record, text)
        if len(points) < 2:
            continue
        sparsities, qualities = zip(*points, strict=True)
        style = _style(number, record)
        if len(points) < _LEAST_POINTS:
            style["linestyle"] = "none"
        axes.plot(sparsities, qualities, **style)
        dense = qualities[0]
        axes.axhline(dense, color="#909090", linewidth=0.8, linestyle="--", zorder=0)
        lowest = min(lowest, *qualities)
        highest = max(highest, *qualities)
    if text is not None and highest > _LINEAR_UP_TO * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_log_formatter())
        axes.yaxis.set_minor_formatter(_log_formatter())
        axes.set_ylim(top=min(axes.get_ylim()[1], _HIGHEST * lowest))
    else:
        axes.set_ylim(0, 1.06 * highest or 1.0)
    axes.grid(which="both", **_SOFT)
    if highest and len(records) > 1:
        axes.legend()
    return figure


def has_line(record: Mapping[str, Any], text: str | None) -> bool:
    """Whether a run has enough points for a line over its rounds; see `quality_figure`."""
    return len(_points(record, text)) >= _LEAST_POINTS


def _log_formatter() -> LogFormatter:
    return LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5))


def _style(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the style of a run, which is the same in every figure."""
    return {
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "color": _color(number),
        "label": record["spec"]["name"],
    }


def _color(number: int) -> str:
    colors = rcParams["axes.prop_cycle"].by_key()["color"]
    return str(colors[number % len(colors)])


@_styled
def reach_figure(record: Mapping[str, Any]) -> Figure:
    """Plot the predicted loss increase against sparsity, and the run's measurements on it.

    The line is dashed beyond the sparsity of the last round. The upper axis has the size of the
    weights that a sparsity leaves.
    """
    curve = loss_curve(record)
    figure, axes = _axes(
        "removed weights of the blocks, %", "loss increase, nats per token"
    )
    end = record["shots"][-1]["sparsity"]
    inside = [point for point in curve if point[0] <= end]
    beyond = [inside[-1], *(point for point in curve if point[0] > end)]
    for points, line, label in ((inside, "-", "predicted"), (beyond, "--", None)):
        sparsities = [100 * sparsity for sparsity, _ in points]
        increases = [increase for _, increase in points]
        axes.plot(sparsities, increases, line, color=_color(0), label=label)
    highest = curve[-1][1]
    for number, text in enumerate(record["dense"]["perplexity"], start=1):
        sparsities = []
        increases = []
        for shot in record["shots"]:
            measured = measured_increases(record, shot)
            if text in measured:
                sparsities.append(100 * shot["sparsity"])
                increases.append(measured[text])
        style = _style(number, record)
        style["label"] = f"measured, {text}"
        axes.plot(sparsities, increases, linestyle="none", **style)
        highest = max(highest, *increases, 0.0)
    for size, speed, shot in _timed_exports(record):
        place = (100 * shot["sparsity"], 0.0)
        axes.axvline(place[0], color="#909090", linewidth=0.8, linestyle=":", zorder=0)
        words = speed_words(speed).replace(", ", "\n")
        if size is not None:
            words = f"generation\n{faster(speed['decode_ratio'])}"
        is_right = shot["sparsity"] > 0.6 * curve[-1][0] and size is None
        axes.annotate(
            words,
            xy=place,
            xytext=(-4 if is_right else 4, 5),
            ha="right" if is_right else "left",
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=min(0.0, curve[-1][1]), top=1.1 * highest or 1.0)
    if structure_of(record) == "groups":
        _add_size_axis(axes, record)
    axes.grid(**_SOFT)
    axes.legend(loc="upper left")
    return figure


def _add_size_axis(axes: Axes, record: Mapping[str, Any]) -> None:
    """Add an upper axis with the size of the weights in MB."""
    whole = bytes_at(record, 0.0) / 1e6
    removable = whole - bytes_at(record, 1.0) / 1e6

    def size_at(percent: ArrayLike) -> ArrayLike:
        return whole - removable * np.asarray(percent, float) / 100

    def percent_at(size: ArrayLike) -> ArrayLike:
        return 100 * (whole - np.asarray(size, float)) / removable

    upper = axes.secondary_xaxis("top", functions=(size_at, percent_at))
    upper.set_xlabel(f"size of the weights in {record['spec']['model']['dtype']}, MB")


@_styled
def widths_figure(record: Mapping[str, Any]) -> Figure:
    """Plot what is left of every kind of groups by block, from zero; grey: the dense model."""
    kinds = [widths for widths in widths_of(record) if not widths.is_uniform]
    height = 0.5 + 1.6 * len(kinds)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for number, (axes, widths) in enumerate(zip(panels, kinds, strict=True)):
        blocks = range(len(widths.left))
        axes.bar(blocks, [widths.before] * len(blocks), 0.8, color="#909090", alpha=0.25)
        axes.bar(blocks, widths.left, 0.8, color=_color(number))
        axes.set_ylabel(textwrap.fill(widths.name, 20))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        axes.margins(x=0.01)
    panels[-1].set_xlabel("block")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@_styled
def sizes_figure(record: Mapping[str, Any]) -> Figure:
    """Plot the divergence on every text against the speed of generation of a family's sizes."""
    figure, axes = _axes(
        "speed of generation, dense model = 1", "divergence, nats per token"
    )
    points = _timed_exports(record)
    for number, text in enumerate(record["dense"]["perplexity"]):
        speeds = [1.0]
        divergences = [0.0]
        for _size, speed, shot in points:
            speeds.append(speed["decode_ratio"])
            divergences.append(shot["divergence"][text])
        style = _style(number, record)
        style["label"] = text
        axes.plot(speeds, divergences, **style)
    for size, speed, shot in points:
        assert size is not None
        axes.annotate(
            size_name(record, size),
            xy=(speed["decode_ratio"], max(shot["divergence"].values())),
            xytext=(0, 6),
            textcoords="offset points",
        )
    axes.set_ylim(bottom=0)
    axes.grid(**_SOFT)
    axes.legend()
    return figure


def _timed_exports(
    record: Mapping[str, Any],
) -> list[tuple[float | None, Mapping[str, Any], Mapping[str, Any]]]:
    """Return the timed exports: size of a family or None, measured speed, and shot."""
    if not record["shots"]:
        return []
    timed = []
    for size, shot in shots_by_size(record).items():
        for export in record["exports"]:
            if export.get("size") == size and "speed" in export:
                timed.append((size, export["speed"], shot))
    return timed


def _trainings(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the shots whose training was checked, and the present one before it ends."""
    shots = (*record["shots"], record.get("present", {}))
    return [shot for shot in shots if shot.get("recovery_held_aside")]


@_styled
def training_figure(records: Records) -> Figure:
    """Plot the checks of trainings after pruning against their tokens.

    The upper panel has the divergence or loss on validation windows, with the loss of each step as
    a pale line; the lower one has the agreement with the original, if it is known. Trainings after
    the shots of a run stand side by side.
    """
    labels = {"value": "nats per token"}
    if _has_acceptance(records):
        labels["acceptance"] = "agreement with\nthe original"
    figure = Figure(figsize=(_WIDTH, 3.0), layout="constrained")
    panels = figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0]
    highest = 0.0  # loss of the steps
    for number, record in enumerate(records):
        style = _style(number, record)
        before = 0  # tokens of the trainings before
        for shot in _trainings(record):
            held = shot["recovery_held_aside"]
            tokens = [before + check["tokens"] for check in held]
            for axes, (measure, label) in zip(panels, labels.items(), strict=True):
                values = np.array([check[measure] for check in held], float)
                axes.plot(tokens, values, **style)
                axes.set_ylabel(label)
            losses = _smoothed(shot["recovery_losses"])
            places = np.linspace(before, tokens[-1], len(losses) + 1)[1:]
            # an artist does not change the limits of the axes, as losses may be far away
            line = Line2D(places, losses, color=style["color"], linewidth=1, alpha=0.4)
            panels[0].add_artist(line)
            highest = max([highest, *losses])
            before = tokens[-1]
            style["label"] = None
    top = panels[0].get_ylim()[1]
    panels[0].set_ylim(top=max(top, min(1.05 * highest, 1.5 * top)))
    if len(records) > 1:
        panels[0].legend()
    panels[-1].set_xlabel("tokens of training")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Return the means of equal parts of the losses of all steps."""
    parts = np.array_split(np.array(losses, float), max(1, min(_LOSS_PARTS, len(losses))))
    return [float(part.mean()) for part in parts if len(part)]


def _has_acceptance(records: Records) -> bool:
    for record in records:
        for shot in _trainings(record):
            if any(check["acceptance"] for check in shot["recovery_held_aside"]):
                return True
    return False


def by_block(linears: Records) -> dict[str, list[float]]:
    """Return the mean sparsity of every kind of linear in every block.

    It is NaN where a block has no such linear. Linears that are numbered inside of a block, such as
    experts, are one kind.
    """
    kinds: dict[str, dict[int, list[float]]] = {}
    for linear in linears:
        _, block, place = re.split(r"\.(\d+)\.", linear["name"], maxsplit=1)
        blocks = kinds.setdefault(re.sub(r"\.\d+\.", ".*.", place), {})
        blocks.setdefault(int(block), []).append(linear["sparsity"])
    last = max(max(blocks) for blocks in kinds.values())
    means: dict[str, list[float]] = {}
    for kind, blocks in kinds.items():
        means[kind] = []
        for block in range(last + 1):
            means[kind].append(statistics.fmean(blocks.get(block, [math.nan])))
    return means


def depth_figure(linears: Records) -> Figure:
    """Plot sparsity by block and kind of linear as a heat map (The LLM Surgeon, figure 4)."""
    kinds = by_block(linears)
    highest = 0.05
    for sparsities in kinds.values():
        for sparsity in sparsities:
            if not math.isnan(sparsity):
                highest = max(highest, sparsity)
    figure, axes = _axes("block", "", 1.0 + 0.22 * len(kinds))
    filled = axes.pcolormesh(list(kinds.values()), cmap="viridis", vmin=0, vmax=highest)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(np.arange(len(kinds)) + 0.5, _short_names(list(kinds)))
    figure.colorbar(filled, ax=axes, label="share removed", aspect=12)
    return figure


def _short_names(kinds: Sequence[str]) -> list[str]:
    """Return the last part of each dotted name, or the whole name where that is ambiguous."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    names = []
    for kind, end in zip(kinds, ends, strict=True):
        is_ambiguous = ends.count(end) > 1
        names.append(kind if is_ambiguous else end)
    return names


@_styled
def time_figure(record: Mapping[str, Any]) -> Figure:
    """Plot the wall time of every part of a run as a bar of its steps."""
    parts = phases(record)
    height = min(8.0, 1.4 + 0.3 * len(parts))
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    steps: dict[str, None] = {}
    for part in parts:
        steps.update(dict.fromkeys(part.seconds))
    places = np.arange(len(parts))
    left = np.zeros(len(parts))
    for number, step in enumerate(steps):
        lengths = np.array([part.seconds.get(step, 0.0) for part in parts])
        hatch = "" if number < len(_STEP_COLORS) else "///"
        color = _STEP_COLORS[number % len(_STEP_COLORS)]
        axes.barh(places, lengths, 0.7, left=left, label=step, color=color, hatch=hatch)
        left = left + lengths
    for place, part in enumerate(parts):
        axes.annotate(
            duration(part.total_s),
            xy=(part.total_s, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(places, [part.name for part in parts])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_xlim(0, 1.15 * max(left))
    axes.grid(axis="x", **_SOFT)
    axes.set_axisbelow(True)
    figure.legend(ncols=4, loc="outside upper left")
    return figure


def quality_figures(records: Records) -> dict[str, Figure]:
    """Return figures by name: acceptance, perplexity on every text, trainings.

    Acceptance and trainings are left out if the records have none. A single run has those with
    a line only.
    """
    figures = {}
    is_alone = len(records) == 1
    if has_generation(records) and not (is_alone and not has_line(records[0], None)):
        figures["acceptance"] = quality_figure(records, text=None)
    for text in texts_of(records):
        if not is_alone or has_line(records[0], text):
            figures[f"perplexity-{text}"] = quality_figure(records, text)
    if any(map(_trainings, records)):
        figures["training"] = training_figure(records)
    return figures


@_styled
def run_figures(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of one run, by name, without those that would be empty."""
    figures = quality_figures([record])
    if not record["shots"]:
        return figures
    if len(loss_curve(record)) >= _LEAST_POINTS:
        figures["reach"] = reach_figure(record)
    widths = widths_of(record)
    if not widths:
        if any(linear["sparsity"] for linear in record["linears"]):
            figures["depth"] = depth_figure(record["linears"])
    elif not all(each.is_uniform for each in widths):
        figures["widths"] = widths_figure(record)
    figures["time"] = time_figure(record)
    if sizes_of(record) and len(_timed_exports(record)) >= _LEAST_POINTS - 1:
        figures["sizes"] = sizes_figure(record)
    return figures
