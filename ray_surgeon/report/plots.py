"""Figures as PNG, SVG or PDF files, or as SVG inside a page. No window, no network."""

from __future__ import annotations

import io
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from ray_surgeon.report.progress import has_generation, texts_of
from ray_surgeon.storage import files

Records = Sequence[Mapping[str, Any]]
"""Contents of report.json, or entries of one."""

FORMATS = ("png", "svg", "pdf")

_MARKERS = "osD^vP*X<>"
_INK = "#010101"
"""What a page replaces by its own colour of text, see plots.mplstyle."""
_SOFT: dict[str, Any] = {"color": "#808080", "alpha": 0.3, "linewidth": 0.5}
_OF_LINEARS = "sparsity of the blocks' linears, %"
_HIGHEST = 8.0
"""Times the dense perplexity above which a value is not drawn.

Such a model has collapsed, and would press all the rest into one line.
"""


_styled = rc_context(fname=Path(__file__).with_name("plots.mplstyle"))


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
        figure.savefig(file, dpi=150, facecolor="white")
        figure.set_layout_engine("none")  # it is laid out; another format need not do it again
        files.put_file(uri, file)


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


def _draw_curve(axes: Axes, number: int, points: Sequence[tuple[float, float]], label: str) -> None:
    """Draw the line of a run; its number makes it look the same in every figure."""
    colors = rcParams["axes.prop_cycle"].by_key()["color"]
    axes.plot(
        *zip(*points, strict=True),
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        linewidth=1.4,
        label=label,
        color=colors[number % len(colors)],
    )


@_styled
def perplexity_figure(records: Records, text: str) -> Figure:
    """Plot perplexity against sparsity, one line a run, with the dense model at zero.

    Lines that leave the plot say how far.

    Args:
        records: contents of report.json.
        text: name of the evaluation text; runs without it are left out.
    """
    figure, axes = _axes(_OF_LINEARS, f"perplexity on {text}")
    dense = [record["dense"]["perplexity"].get(text, math.inf) for record in records]
    highest = _HIGHEST * max(filter(math.isfinite, dense), default=1.0)
    lowest = math.inf
    top = 1.0
    for number, record in enumerate(records):
        start = dense[number]
        if not math.isfinite(start):
            continue
        points = [(100 * shot["sparsity"], shot["perplexity"][text]) for shot in record["shots"]]
        points = [(0.0, start), *((x, y) for x, y in points if math.isfinite(y))]
        values = [y for _, y in points]
        left_out = f" (up to {max(values):.3g})" if max(values) > highest else ""
        _draw_curve(axes, number, points, f"{record['spec']['name']}{left_out}")
        label = None if math.isfinite(lowest) else "dense"
        axes.axhline(start, color="#909090", linewidth=0.8, linestyle="--", zorder=0, label=label)
        top = max(top, 1.5 * start, *(y for y in values if y <= highest))
        lowest = min(lowest, *values)
    axes.set_yscale("log")
    if math.isfinite(lowest):
        axes.set_ylim(0.95 * lowest, 1.1 * top)
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.grid(which="both", **_SOFT)
    axes.legend()
    return figure


def acceptance_figure(records: Records) -> Figure:
    """Plot the acceptance rate against sparsity, one line a run; runs without it are left out."""
    figure, axes = _axes(_OF_LINEARS, "acceptance rate")
    lowest = 1.0
    for number, record in enumerate(records):
        shots = [shot for shot in record["shots"] if shot.get("generation")]
        measured = [(100 * s["sparsity"], s["generation"]["acceptance"]) for s in shots]
        if measured:
            _draw_curve(axes, number, [(0.0, 1.0), *measured], str(record["spec"]["name"]))
            lowest = min(lowest, *(y for _, y in measured))
    axes.set_ylim(max(0.0, lowest - 0.05), 1.01)
    axes.grid(**_SOFT)
    axes.legend(loc="lower left")
    return figure


def by_block(linears: Records) -> tuple[list[str], list[list[float]]]:
    """Return the kinds of linears, and per kind the mean sparsity in every block.

    It is not a number where a block has none.
    """
    # the experts of a block together
    kinds = _by_place(linears, lambda name: re.sub(r"\.\d+\.", ".*.", name))
    return list(kinds), list(kinds.values())


def by_expert(linears: Records) -> list[list[float]]:
    """Return, for every expert, the mean sparsity of its linears in every block.

    Nothing if there are no experts.
    """
    experts = _by_place(linears, lambda name: next(iter(re.findall(r"\.(\d+)\.", name)), None))
    return [experts[number] for number in sorted(experts, key=int)]


def _by_place(linears: Records, place_of: Callable[[str], str | None]) -> dict[str, list[float]]:
    """Return the mean sparsity in every block of the linears that share a place in their block.

    Args:
        linears: entries of report.json.
        place_of: takes a linear's name in its block; None leaves the linear out.
    """
    places: dict[str, dict[int, list[float]]] = {}
    for linear in linears:
        match = re.fullmatch(r".*?\.(\d+)\.(.+)", linear["name"])
        assert match is not None, f"{linear['name']} is in no block"
        place = place_of(match[2])
        if place is not None:
            blocks = places.setdefault(place, {})
            blocks.setdefault(int(match[1]), []).append(linear["sparsity"])
    num_blocks = 1 + max((block for blocks in places.values() for block in blocks), default=-1)
    means = dict[str, list[float]]()
    for place, blocks in places.items():
        values = [blocks.get(block, []) for block in range(num_blocks)]
        means[place] = [sum(part) / len(part) if part else math.nan for part in values]
    return means


def _heat_map(
    sparsities: Sequence[Sequence[float]], y_label: str, height: float, highest: float = 1.0
) -> tuple[Figure, Axes]:
    """Plot sparsities, a line each; blocks are from left to right."""
    figure, axes = _axes("block", y_label, height)
    filled = axes.pcolormesh(sparsities, cmap="viridis", vmin=0, vmax=highest)
    axes.invert_yaxis()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(filled, ax=axes, label="sparsity", aspect=12)
    return figure, axes


def depth_figure(linears: Records) -> Figure:
    """Plot sparsity by block and kind of linear as a heat map (The LLM Surgeon, figure 4)."""
    kinds, sparsities = by_block(linears)
    highest = max(0.05, *(v for row in sparsities for v in row if v == v))
    figure, axes = _heat_map(sparsities, "", 1.2 + 0.28 * len(kinds), highest)
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], _short(kinds))
    return figure


def _short(kinds: Sequence[str]) -> list[str]:
    """Return the last parts of the kinds' names, and of those with equal ones the whole names."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return [kind if last.count(part) > 1 else part for kind, part in zip(kinds, last, strict=True)]


def time_figure(shots: Records) -> Figure:
    """Plot the time of every step of every shot, stacked, and all workers' peak memory."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    times, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    places = [shot["index"] for shot in shots]
    below = [0.0] * len(shots)
    for step in dict.fromkeys(step for shot in shots for step in shot["seconds"]):
        heights = [shot["seconds"].get(step, 0.0) for shot in shots]
        times.bar(places, heights, 0.7, bottom=below, label=step)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    times.set_ylabel("seconds")
    times.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    has_gpus = any(shot["peak_gpu_bytes"] for shot in shots)
    curves = [("peak_rss_bytes", "o-", "memory"), ("peak_gpu_bytes", "s-", "GPU memory")]
    for name, style, label in curves if has_gpus else curves[:1]:
        sizes = [shot[name] / 2**30 for shot in shots]
        memory.plot(places, sizes, style, markersize=4, label=label)
    if has_gpus:
        memory.legend()
    memory.set(xlabel="shot", ylabel="peak, GiB", xlim=(0.4, max(places[-1], 3) + 0.6))
    memory.set_ylim(bottom=0)
    memory.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (times, memory):
        axes.grid(axis="y", **_SOFT)
    return figure


@_styled
def quality_figures(records: Records) -> dict[str, Figure]:
    """Return acceptance, if it is known, and perplexity on every text against sparsity, by name."""
    figures = {"acceptance": acceptance_figure(records)} if has_generation(records) else {}
    by_text = {text: perplexity_figure(records, text) for text in texts_of(records)}
    return figures | {f"perplexity-{text}": figure for text, figure in by_text.items()}


@_styled
def run_figures(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of one run, by name; those for which it has no data are left out."""
    figures = quality_figures([record])
    if record["shots"]:
        figures["depth"] = depth_figure(record["linears"])
        if experts := by_expert(record["linears"]):
            height = min(8.0, 1.4 + 0.12 * len(experts))
            figures["experts"], _ = _heat_map(experts, "expert", height)  # 1 is one that is gone
        figures["time"] = time_figure(record["shots"])
    return figures
