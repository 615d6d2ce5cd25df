"""Figures as PNG, SVG or PDF files, or as SVG inside a page. No window, no network."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator

from ray_surgeon.report.record import family_of, has_generation, size_name, texts_of
from ray_surgeon.storage import files

Records = Sequence[Mapping[str, Any]]
"""Contents of report.json, or entries of one."""

_MARKERS = "osD^vP*X<>"
_INK = "#010101"
"""What a page replaces by its own colour of text, see plots.mplstyle."""
_SOFT: dict[str, Any] = {"color": "#808080", "alpha": 0.3, "linewidth": 0.5}
_HIGHEST = 8.0
"""Times the dense perplexity above which a value is not drawn.

Such a model has collapsed, and would press all the rest into one line.
"""


_styled = rc_context(fname=Path(__file__).with_name("plots.mplstyle"))


def save(figure: Figure, uri: str) -> None:
    """Write a figure, in the format that the name ends in.

    Raises:
        ValueError: matplotlib knows no such format.
    """
    with files.replacing(uri) as file:
        figure.savefig(file, format=uri.rpartition(".")[2], dpi=150, facecolor="white")


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element that takes the colour of the text around it.

    Args:
        figure: to draw.
        name: distinguishes the identifiers inside from those of other figures of a page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    name = re.sub("[^A-Za-z0-9-]", "-", name)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    figure.set_layout_engine("none")  # it is laid out; another format need not do it again
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"\b(id=\"|url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    return re.sub(r'width="[^"]*" height="[^"]*"', "", svg, count=1)


def _axes(x_label: str, y_label: str, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def _points(record: Mapping[str, Any], text: str | None) -> list[tuple[float, float]]:
    """Return sparsity and quality of the dense model and after every shot; see `quality_figure`."""
    dense = record["dense"] | {"sparsity": 0.0, "generation": {"acceptance": 1.0}}
    points = []
    for state in (dense, *record["shots"]):
        quality = (state.get("generation") or {}).get("acceptance", math.inf)
        if text is not None:
            quality = state["perplexity"].get(text, math.inf)
        if math.isfinite(quality):
            points.append((100 * state["sparsity"], quality))
    return points


@_styled
def quality_figure(records: Records, text: str | None) -> Figure:
    """Plot a measure against sparsity, one line a run, with the dense model at zero.

    Args:
        records: contents of report.json.
        text: on which perplexity is plotted; None for the acceptance rate. Runs that were not
            measured are left out.
    """
    label = "acceptance rate" if text is None else f"perplexity on {text}"
    figure, axes = _axes("sparsity of the blocks' linears, %", label)
    highest = 0.0
    for number, record in enumerate(records):
        points = _points(record, text)
        if len(points) < 2:
            continue
        axes.plot(*zip(*points, strict=True), **_style(number, record))
        _, dense = points[0]
        axes.axhline(dense, color="#909090", linewidth=0.8, linestyle="--", zorder=0)
        highest = max(highest, _HIGHEST * dense)
    if highest and text is not None:
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axes.set_ylim(top=min(axes.get_ylim()[1], highest))
    axes.grid(which="both", **_SOFT)
    if highest:
        axes.legend()
    return figure


def _style(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a run is drawn: its number makes it look the same in every figure."""
    colors = rcParams["axes.prop_cycle"].by_key()["color"]
    style: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
    return style | {"color": colors[number % len(colors)], "label": record["spec"]["name"]}


@_styled
def sizes_figure(record: Mapping[str, Any]) -> Figure:
    """Plot the divergence on every text against the decoding speed of the sizes of a family."""
    figure, axes = _axes("new tokens, times as fast as the dense model", "divergence, nats a token")
    points = _timed_sizes(record)
    for number, text in enumerate(record["dense"]["perplexity"]):
        line = [(1.0, 0.0), *((speed, shot["divergence"][text]) for _, speed, shot in points)]
        axes.plot(*zip(*line, strict=True), **_style(number, record) | {"label": text})
    for size, speed, shot in points:
        highest = max(shot["divergence"].values())
        axes.annotate(size_name(record, size), (speed, highest), (0, 6), textcoords="offset points")
    axes.grid(**_SOFT)
    axes.legend()
    return figure


def _timed_sizes(record: Mapping[str, Any]) -> list[tuple[float, float, Mapping[str, Any]]]:
    """Return the sizes that were timed: size, speed, and the shot."""
    return [
        (size, export["speed"]["decode_ratio"], shot)
        for size, shot in family_of(record).items()
        for export in shot["exports"]
        if "speed" in export
    ]


def _trainings(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what is known of trainings that were checked, also of one that has not ended."""
    shots = (*record["shots"], record.get("present", {}))
    return [shot for shot in shots if shot.get("recovery_held_aside")]


@_styled
def training_figure(records: Records) -> Figure:
    """Plot what trainings after pruning came to on windows held aside, against their tokens.

    That is the divergence or loss, with the loss of each step as a thin line, and below it the
    acceptance, if it is known. Trainings after the shots of a run stand side by side.
    """
    labels = {"value": "nats per token"}
    shots = [shot for record in records for shot in _trainings(record)]
    if any(check["acceptance"] for shot in shots for check in shot["recovery_held_aside"]):
        labels["acceptance"] = "acceptance rate"
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    panels = figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0]
    for number, record in enumerate(records):
        style = _style(number, record)
        before = 0  # tokens of the trainings before
        for shot in _trainings(record):
            held = shot["recovery_held_aside"]
            tokens = [before + check["tokens"] for check in held]
            for axes, (measure, label) in zip(panels, labels.items(), strict=True):
                axes.plot(tokens, np.array([c[measure] for c in held], float), **style)
                axes.set_ylabel(label)
            losses = shot["recovery_losses"]
            places = np.linspace(before, tokens[-1], len(losses) + 1)[1:]
            # an artist alone leaves the limits as they are: losses of steps scatter
            panels[0].add_artist(Line2D(places, losses, color=style["color"], lw=0.5, alpha=0.4))
            before = tokens[-1]
            style["label"] = None
    panels[0].legend()
    panels[-1].set_xlabel("tokens of training")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def by_block(linears: Records) -> dict[str, list[float]]:
    """Return, for every kind of linear, the mean sparsity in every block.

    It is not a number where a block has none. The linears of a kind that are numbered inside of a
    block are taken together.
    """
    kinds: dict[str, dict[int, list[float]]] = {}
    for linear in linears:
        _, block, place = re.split(r"\.(\d+)\.", linear["name"], maxsplit=1)
        blocks = kinds.setdefault(re.sub(r"\.\d+\.", ".*.", place), {})
        blocks.setdefault(int(block), []).append(linear["sparsity"])
    every = range(1 + max(block for blocks in kinds.values() for block in blocks))
    return {
        kind: [statistics.fmean(blocks.get(block, [math.nan])) for block in every]
        for kind, blocks in kinds.items()
    }


def depth_figure(linears: Records) -> Figure:
    """Plot sparsity by block and kind of linear as a heat map (The LLM Surgeon, figure 4)."""
    kinds = by_block(linears)
    highest = max(0.05, *(v for row in kinds.values() for v in row if v == v))
    figure, axes = _axes("block", "", 1.2 + 0.28 * len(kinds))
    filled = axes.pcolormesh(list(kinds.values()), cmap="viridis", vmin=0, vmax=highest)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = [kind.rpartition(".")[2] for kind in kinds]
    # the last parts of the kinds' names, and of those with equal ones the whole names
    labels = [kind if last.count(end) > 1 else end for kind, end in zip(kinds, last, strict=True)]
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], labels)
    figure.colorbar(filled, ax=axes, label="sparsity", aspect=12)
    return figure


def steps_of(shots: Records) -> list[str]:
    """Return the names of the steps of shots, in their order."""
    return list(dict.fromkeys(step for shot in shots for step in shot["seconds"]))


def time_figure(shots: Records) -> Figure:
    """Plot the time of every step of every shot, stacked, and all workers' peak memory."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    times, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    places = [shot["index"] for shot in shots]
    below = [0.0] * len(shots)
    for step in steps_of(shots):
        heights = [shot["seconds"].get(step, 0.0) for shot in shots]
        times.bar(places, heights, 0.7, bottom=below, label=step)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    times.set_ylabel("seconds")
    times.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    for name, style, label in (("rss", "o-", "memory"), ("gpu", "s-", "GPU memory")):
        sizes = [shot[f"peak_{name}_bytes"] / 2**30 for shot in shots]
        if any(sizes):
            memory.plot(places, sizes, style, markersize=4, label=label)
    memory.legend()
    memory.set(xlabel="shot", ylabel="peak, GiB", xlim=(0.4, max(places[-1], 3) + 0.6))
    memory.set_ylim(bottom=0)
    memory.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (times, memory):
        axes.grid(axis="y", **_SOFT)
    return figure


def quality_figures(records: Records) -> dict[str, Figure]:
    """Return figures by name: acceptance, if it is known, perplexity on every text, trainings."""
    measures: dict[str, str | None] = {"acceptance": None} if has_generation(records) else {}
    measures |= {f"perplexity-{text}": text for text in texts_of(records)}
    trained = {"training": training_figure(records)} if any(map(_trainings, records)) else {}
    return {name: quality_figure(records, text) for name, text in measures.items()} | trained


@_styled
def run_figures(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of one run, by name; those for which it has no data are left out."""
    figures = quality_figures([record])
    if record["shots"]:
        figures["depth"] = depth_figure(record["linears"])
        figures["time"] = time_figure(record["shots"])
    if _timed_sizes(record):
        figures["sizes"] = sizes_figure(record)
    return figures
