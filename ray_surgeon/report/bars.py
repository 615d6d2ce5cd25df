"""Bars that begin at zero, of the original model and of what a run has made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_surgeon.checkpointing import Record
from ray_surgeon.report.findings import NO_CHANGE, faster, megabytes, percent, quantity
from ray_surgeon.report.record import (
    dense_bytes,
    shots_by_size,
    size_name,
    source_bytes,
    structure_of,
)


@dataclass(frozen=True)
class Bar:
    """One bar, which begins at zero."""

    label: str
    value: float
    shown: str  # value with its unit
    fraction: float = 0.0  # of the longest bar beside it
    is_dense: bool = False  # whether it is of the dense model


@dataclass(frozen=True)
class Bars:
    """Bars of one measure, before and after."""

    title: str
    bars: tuple[Bar, ...]
    change: str = ""  # of the last bar against the first one
    is_better: bool | None = None  # None if the change is none


def _bars(
    title: str, bars: Sequence[Bar], *, higher_is_better: bool, change: str = ""
) -> Bars:
    """Return bars with their lengths; the change is that of the last against the first one."""
    finite = [bar.value for bar in bars if math.isfinite(bar.value)]
    highest = max(finite, default=0.0)
    scaled = list[Bar]()
    for bar in bars:
        fraction = 1.0
        if highest > 0:
            fraction = min(1.0, bar.value / highest)
        scaled.append(Bar(bar.label, bar.value, bar.shown, fraction, bar.is_dense))
    first = bars[0].value
    last = bars[-1].value
    if not change and first:
        change = percent(last / first)
        if abs(last / first - 1) < NO_CHANGE:
            change = "unchanged"
    is_better = None
    if change not in ("unchanged", faster(1.0)):
        is_better = (last > first) == higher_is_better
    return Bars(title, tuple(scaled), change, is_better)


def before_and_after(record: Record) -> list[Bars]:
    """Return the bars of a run: agreement, perplexities, tasks, size, speeds."""
    if not record["shots"]:
        return []
    names = dict[float | None, str]()
    for size in shots_by_size(record):
        names[size] = "pruned" if size is None else f"{size_name(record, size)} removed"
    if structure_of(record) == "none":
        names[None] = "after the run"
    found = _agreement_bars(record, names)
    found += _perplexity_bars(record, names)
    found += _task_bars(record, names)
    found += _size_bars(record, names)
    return found + _speed_bars(record, names)


Names = Mapping[float | None, str]
"""Size of a family -> its name; the only key is None if there is one size."""


def _agreement_bars(record: Record, names: Names) -> list[Bars]:
    bars = [Bar("original", 1.0, "100 %", is_dense=True)]
    for size, shot in shots_by_size(record).items():
        if shot.get("generation"):
            share = shot["generation"]["acceptance"]
            bars.append(Bar(names[size], share, f"{100 * share:.1f} %"))
    if len(bars) == 1:
        return []
    change = f"{100 * (bars[-1].value - 1):.1f} points"
    return [
        _bars("Agreement with the original", bars, higher_is_better=True, change=change)
    ]


def _perplexity_bars(record: Record, names: Names) -> list[Bars]:
    found = list[Bars]()
    for text, before in record["dense"]["perplexity"].items():
        bars = [Bar("original", before, quantity(before), is_dense=True)]
        for size, shot in shots_by_size(record).items():
            after = shot["perplexity"].get(text, math.nan)
            bars.append(Bar(names[size], after, quantity(after)))
        found.append(_bars(f"Perplexity, {text}", bars, higher_is_better=False))
    return found


def _task_bars(record: Record, names: Names) -> list[Bars]:
    found = list[Bars]()
    for task, metrics in record["dense"].get("tasks", {}).items():
        for metric, before in metrics.items():
            if metric.endswith("_stderr") or not isinstance(before, (int, float)):
                continue
            bars = [Bar("original", before, quantity(before), is_dense=True)]
            for export in _exports(record):
                value = export.get("tasks", {}).get(task, {}).get(metric)
                if value is not None:
                    label = _label_of(record, export, names)
                    bars.append(Bar(label, value, quantity(value)))
            if len(bars) > 1:
                found.append(_bars(f"{task}, {metric}", bars, higher_is_better=True))
    return found


def _exports(record: Record) -> list[Record]:
    """Return the exports in the order of the sizes of a family."""
    ordered = list[Record]()
    for size in shots_by_size(record):
        ordered += [each for each in record["exports"] if each.get("size") == size]
    return ordered


def _label_of(record: Record, export: Record, names: Names) -> str:
    """Return the name of an export, with its size where there are several."""
    if "size" in export:
        return f"{export['kind']}, {names.get(export['size'], size_name(record, export['size']))}"
    return f"{export['kind']} export"


def _size_bars(record: Record, names: Names) -> list[Bars]:
    whole = dense_bytes(record)
    given = source_bytes(record)
    dtype = record["spec"]["model"]["dtype"]
    bars = list[Bar]()
    # a file of another format than the dtype of the run
    if given and abs(given / whole - 1) > 0.02:
        bars.append(Bar("file that was given", given, megabytes(given), is_dense=True))
    bars.append(Bar(f"original, {dtype}", whole, megabytes(whole), is_dense=True))
    for export in _exports(record):
        for name, size in _sizes_of_files(record, export, names):
            bars.append(Bar(name, size, megabytes(size)))
    if all(bar.is_dense for bar in bars):
        return []
    return [_bars("Size of the weights", bars, higher_is_better=False)]


def _sizes_of_files(
    record: Record, export: Record, names: Names
) -> list[tuple[str, float]]:
    """Return (name, bytes) of an export, or of each of its files if these are models."""
    label = _label_of(record, export, names)
    if "files" not in export:
        return [(label, export["size_bytes"])]
    return [(f"{file['file']}", file["size_bytes"]) for file in export["files"]]


def _speed_bars(record: Record, names: Names) -> list[Bars]:
    found = list[Bars]()
    for step, title in (("prefill", "Reading prompts"), ("decode", "Generation")):
        bars = list[Bar]()
        for export in _exports(record):
            if "speed" not in export:
                continue
            dense = export["speed"]["dense"][f"{step}_tokens_per_s"]["median"]
            ratio = export["speed"][f"{step}_ratio"]
            if not bars:
                bars.append(
                    Bar("original", 1.0, f"{quantity(dense)} tokens/s", 0.0, True)
                )
            # each export was measured in alternation with the dense model, so ratios are compared
            pruned = export["speed"]["pruned"][f"{step}_tokens_per_s"]["median"]
            label = _label_of(record, export, names)
            bars.append(Bar(label, ratio, f"{quantity(pruned)} tokens/s"))
        if bars:
            change = faster(bars[-1].value)
            found.append(_bars(title, bars, higher_is_better=True, change=change))
    return found
