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
"""Colour that a page replaces by the colour of its text, see plots.mplstyle."""
_SOFT: dict[str, Any] = {"color": "#808080", "alpha": 0.3, "linewidth": 0.5}
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


def _axes(x_label: str, y_label: str, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
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
            quality = generation.get("acceptance", math.inf)
        else:
            quality = state["perplexity"].get(text, math.inf)
        if math.isfinite(quality):
            points.append((100 * state["sparsity"], quality))
    return points


@_styled
def quality_figure(records: Records, text: str | None) -> Figure:
    """Plot a measure against sparsity, one line per run, with the dense model at zero.

    Runs that were not measured are left out.

    Args:
        records: contents of report.json.
        text: whose perplexity is plotted; None for the acceptance rate.
    """
    label = "acceptance rate" if text is None else f"perplexity on {text}"
    figure, axes = _axes("sparsity of the blocks' linears, %", label)
    highest = 0.0
    for number, record in enumerate(records):
        points = _points(record, text)
        if len(points) < 2:
            continue
        sparsities, qualities = zip(*points, strict=True)
        axes.plot(sparsities, qualities, **_style(number, record))
        dense = qualities[0]
        axes.axhline(dense, color="#909090", linewidth=0.8, linestyle="--", zorder=0)
        highest = max(highest, _HIGHEST * dense)
    if highest and text is not None:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_log_formatter())
        axes.yaxis.set_minor_formatter(_log_formatter())
        axes.set_ylim(top=min(axes.get_ylim()[1], highest))
    axes.grid(which="both", **_SOFT)
    if highest:
        axes.legend()
    return figure


def _log_formatter() -> LogFormatter:
    return LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5))


def _style(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the style of a run, which is the same in every figure."""
    colors = rcParams["axes.prop_cycle"].by_key()["color"]
    return {
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "color": colors[number % len(colors)],
        "label": record["spec"]["name"],
    }


@_styled
def sizes_figure(record: Mapping[str, Any]) -> Figure:
    """Plot the divergence on every text against the decoding speed of the sizes of a family."""
    figure, axes = _axes(
        "new tokens, times as fast as the dense model", "divergence, nats a token"
    )
    points = _timed_sizes(record)
    for number, text in enumerate(record["dense"]["perplexity"]):
        speeds = [1.0]
        divergences = [0.0]
        for _size, speed, shot in points:
            speeds.append(speed)
            divergences.append(shot["divergence"][text])
        style = _style(number, record)
        style["label"] = text
        axes.plot(speeds, divergences, **style)
    for size, speed, shot in points:
        axes.annotate(
            size_name(record, size),
            xy=(speed, max(shot["divergence"].values())),
            xytext=(0, 6),
            textcoords="offset points",
        )
    axes.grid(**_SOFT)
    axes.legend()
    return figure


def _timed_sizes(
    record: Mapping[str, Any],
) -> list[tuple[float, float, Mapping[str, Any]]]:
    """Return the timed sizes of a family: size, speed, and the shot."""
    timed = []
    for size, shot in family_of(record).items():
        for export in shot["exports"]:
            if "speed" in export:
                timed.append((size, export["speed"]["decode_ratio"], shot))
    return timed


def _trainings(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the shots whose training was checked, and the present one before it ends."""
    shots = (*record["shots"], record.get("present", {}))
    return [shot for shot in shots if shot.get("recovery_held_aside")]


@_styled
def training_figure(records: Records) -> Figure:
    """Plot the checks of trainings after pruning against their tokens.

    The upper panel has the divergence or loss on windows held aside, with the loss of each step as
    a thin line; the lower one has the acceptance, if it is known. Trainings after the shots of a
    run stand side by side.
    """
    labels = {"value": "nats per token"}
    if _has_acceptance(records):
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
                values = np.array([check[measure] for check in held], float)
                axes.plot(tokens, values, **style)
                axes.set_ylabel(label)
            losses = shot["recovery_losses"]
            places = np.linspace(before, tokens[-1], len(losses) + 1)[1:]
            # an artist does not change the limits of the axes, because losses of steps scatter
            line = Line2D(places, losses, color=style["color"], linewidth=0.5, alpha=0.4)
            panels[0].add_artist(line)
            before = tokens[-1]
            style["label"] = None
    panels[0].legend()
    panels[-1].set_xlabel("tokens of training")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


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
    figure, axes = _axes("block", "", 1.2 + 0.28 * len(kinds))
    filled = axes.pcolormesh(list(kinds.values()), cmap="viridis", vmin=0, vmax=highest)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(np.arange(len(kinds)) + 0.5, _short_names(list(kinds)))
    figure.colorbar(filled, ax=axes, label="sparsity", aspect=12)
    return figure


def _short_names(kinds: Sequence[str]) -> list[str]:
    """Return the last part of each dotted name, or the whole name where that is ambiguous."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    names = []
    for kind, end in zip(kinds, ends, strict=True):
        is_ambiguous = ends.count(end) > 1
        names.append(kind if is_ambiguous else end)
    return names


def steps_of(shots: Records) -> list[str]:
    """Return the names of the steps of shots, in their order."""
    steps: dict[str, None] = {}
    for shot in shots:
        steps.update(dict.fromkeys(shot["seconds"]))
    return list(steps)


def time_figure(shots: Records) -> Figure:
    """Plot the time of every step of every shot, stacked, and all workers' peak memory."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    times, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    places = [shot["index"] for shot in shots]
    below = np.zeros(len(shots))
    for step in steps_of(shots):
        heights = np.array([shot["seconds"].get(step, 0.0) for shot in shots])
        times.bar(places, heights, 0.7, bottom=below, label=step)
        below = below + heights
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
    """Return figures by name: acceptance, perplexity on every text, trainings.

    Acceptance and trainings are left out if the records have none.
    """
    figures = {}
    if has_generation(records):
        figures["acceptance"] = quality_figure(records, text=None)
    for text in texts_of(records):
        figures[f"perplexity-{text}"] = quality_figure(records, text)
    if any(map(_trainings, records)):
        figures["training"] = training_figure(records)
    return figures


@_styled
def run_figures(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of one run, by name, without those that would be empty."""
    figures = quality_figures([record])
    if record["shots"]:
        figures["depth"] = depth_figure(record["linears"])
        figures["time"] = time_figure(record["shots"])
    if _timed_sizes(record):
        figures["sizes"] = sizes_figure(record)
    return figures
