"""The report as one HTML file that needs nothing else: its bars, tables and figures."""

from __future__ import annotations

import functools
import math
import statistics
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ray_surgeon.checkpointing import Record, RunDirectory
from ray_surgeon.report import findings, plots
from ray_surgeon.report import record as reports
from ray_surgeon.report.findings import (
    NO_CHANGE,
    answers_are_too_short,
    duration,
    faster,
    main_export,
    megabytes,
    percent,
    phases,
    quantity,
    wall_s,
)
from ray_surgeon.report.record import (
    dense_bytes,
    num_shots,
    shots_by_size,
    size_name,
    source_bytes,
    structure_of,
    texts_of,
)
from ray_surgeon.storage import files


@dataclass
class Table:
    """A table of texts; its first column has the names of its rows."""

    header: Sequence[str]
    rows: list[tuple[str, Sequence[str]]] = field(default_factory=list)

    def add(self, name: str, cells: Sequence[str]) -> None:
        """Add a row, unless all of its cells are empty."""
        if any(cells):
            self.rows.append((name, cells))


def round_table(record: Record) -> Table:
    """Return a table with a column for the original model and one for every pruning round."""
    dense = record["dense"]["perplexity"]
    shots = record["shots"]
    table = Table(["", "original", *(f"round {shot['index']}" for shot in shots)])
    agreements = [_share((s.get("generation") or {}).get("acceptance")) for s in shots]
    original = "100 %" if any(agreements) else ""
    table.add("agreement with the original", [original, *agreements])
    table.add("removed weights", ["0 %", *(_share(s["sparsity"], 2) for s in shots)])
    before = record["parameters"]["before"]
    unit, divisor = ("millions", 1e6) if before >= 1e6 else ("thousands", 1e3)
    numbers = [before, *(shot["num_nonzero"] for shot in shots)]
    table.add(f"parameters, {unit}", [f"{each / divisor:,.1f}" for each in numbers])
    for text, perplexity in dense.items():
        values = [_number(s["perplexity"].get(text)) for s in shots]
        table.add(f"perplexity, {text}", [_number(perplexity), *values])
        values = [_number(s["divergence"].get(text)) for s in shots]
        table.add(f"divergence, {text}, nats per token", ["0", *values])
    for name, key in (
        ("divergence on validation windows", "divergence_held_aside"),
        ("loss on calibration text before, nats", "calibration_loss"),
        ("predicted loss increase, nats", "predicted_loss_increase"),
        ("largest cost that was removed", "threshold"),
    ):
        table.add(name, ["", *(_number(s.get(key)) for s in shots)])
    table.add("time", ["", *(duration(sum(s["seconds"].values())) for s in shots)])
    cpu = [duration(sum(s["cpu_seconds"].values())) for s in shots]
    table.add("CPU time", ["", *cpu])
    memory = [f"{s['peak_rss_bytes'] / 2**30:.2f}" for s in shots]
    table.add("peak memory of all workers, GiB", ["", *memory])
    gpu = [s["peak_gpu_bytes"] / 2**30 for s in shots]
    if any(gpu):
        table.add("peak GPU memory, GiB", ["", *(f"{each:.2f}" for each in gpu)])
    return table


def answer_table(record: Record) -> Table:
    """Return a table of the pruned model's answers, with a column for every pruning round."""
    shots = [shot for shot in record["shots"] if shot.get("generation")]
    answers = [shot["generation"] for shot in shots]
    table = Table(["", *(f"round {shot['index']}" for shot in shots)])
    shares = [_share(each["acceptance"]) for each in answers]
    table.add("agreement with the original", shares)
    table.add("same most likely token", [_share(each["agreement"]) for each in answers])
    divergences = [_number(each["divergence"]) for each in answers]
    table.add("divergence, nats per token", divergences)
    equal = []
    for each in answers:
        tokens = each["tokens_until_departure"]
        equal.append(f"{tokens['mean']:.1f} ({tokens['median']:g})")
    table.add("greedy answers agree for, tokens: mean (median)", equal)
    not_ended = [_share(each["not_ended"], 0) for each in answers]
    table.add("does not end an answer that the original ends", not_ended)
    loops = [loop_words(record, each["repeating"]) for each in answers]
    table.add("answers caught in a loop", loops)
    return table


def loop_words(record: Record, share: float) -> str:
    """Return the share of answers that are caught in a loop, or that they are too short."""
    if share == 0 and answers_are_too_short(record):
        return "answers too short to tell"
    return f"{100 * share:.0f} %"


def step_table(record: Record) -> Table:
    """Return a table of all steps of a run, longest first."""
    seconds = dict[str, float]()
    for phase in phases(record):
        for step, step_s in phase.seconds.items():
            seconds[step] = seconds.get(step, 0.0) + step_s
    table = Table(["step", "time", "CPU time", "workers busy"])
    for step, step_s in sorted(seconds.items(), key=lambda item: -item[1]):
        cpu_s, busy = _usage(record["shots"], step)
        table.add(step, [duration(step_s), cpu_s, busy])
    return table


def _usage(shots: Sequence[Record], step: str) -> tuple[str, str]:
    """Return the CPU time of a step in the pruning rounds, and its workers' busy share of time."""
    cpu_s = 0.0
    busy_s = 0.0
    step_s = 0.0
    for shot in shots:
        if step in shot["seconds"]:
            step_s += shot["seconds"][step]
            cpu_s += shot["cpu_seconds"][step]
            busy_s += statistics.fmean(shot["worker_seconds"][step])
    if not step_s:
        return "", ""
    return duration(cpu_s), f"{100 * busy_s / step_s:.0f} %"


def _number(value: Any) -> str:
    if value is None:
        return ""
    if math.isfinite(value) and 0 < abs(value) < 1e-2:
        return f"{value:.3g}"
    return quantity(value)


def _share(value: float | None, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{100 * value:.{digits}f} %"


def comparison_table(records: Sequence[Record]) -> Table:
    """Return a table with a column for every run."""
    table = Table(["", *(str(record["spec"]["name"]) for record in records)])
    last = [record["shots"][-1] if record["shots"] else {} for record in records]
    table.add("structure", [structure_of(record) for record in records])
    rounds = [f"{len(record['shots'])} of {num_shots(record)}" for record in records]
    table.add("pruning rounds", rounds)
    shares = [_share((shot.get("generation") or {}).get("acceptance")) for shot in last]
    table.add("agreement with the original", shares)
    table.add("removed weights", [_share(shot.get("sparsity"), 2) for shot in last])
    for text in texts_of(records):
        cells = []
        for record, shot in zip(records, last, strict=True):
            before = _number(record["dense"]["perplexity"].get(text))
            after = _number(shot.get("perplexity", {}).get(text))
            cells.append(f"{before} → {after}" if after else before)
        table.add(f"perplexity, {text}", cells)
    exports = [main_export(record) for record in records]
    sizes = []
    for record, export in zip(records, exports, strict=True):
        whole = megabytes(dense_bytes(record))
        sizes.append(f"{whole} → {megabytes(export['size_bytes'])}" if export else whole)
    table.add("size of the weights", sizes)
    for name, key in (("prompts", "prefill_ratio"), ("generation", "decode_ratio")):
        speeds = [(export or {}).get("speed", {}).get(key) for export in exports]
        table.add(name, [faster(ratio) if ratio else "" for ratio in speeds])
    table.add("time", [duration(wall_s(record)) for record in records])
    return table


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


_PAGE_EVERY_S = 60.0


def excerpt(text: str, length: int | None = None) -> str:
    """Return a text of a model or a user on one line, without control characters.

    Args:
        text: of any content.
        length: the most characters to show, beyond which the text is cut; None for all.
    """
    visible = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    line = " ".join(visible.split())
    if length is None or len(line) <= length:
        return line
    return line[: length - 3].rstrip() + "..."


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Return an HTML page about one run, or about several: a comparison, and then each of them.

    Args:
        records: contents of report.json; the runs need not have ended.
    """
    return rendered(
        "html_report.html.jinja",
        records=records,
        reports=reports,
        findings=findings,
        before_and_after=before_and_after,
        round_table=round_table,
        step_table=step_table,
        answer_table=answer_table,
        comparison_table=comparison_table,
        loop_words=loop_words,
        plots=plots,
    )


def rendered(template: str, **context: Any) -> str:
    """Return the text of a template of this folder."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment.autoescape = jinja2.select_autoescape(["html.jinja"])
    environment.undefined = jinja2.StrictUndefined
    environment.globals["size_name"] = reports.size_name
    environment.filters["excerpt"] = excerpt
    environment.filters["yaml"] = functools.partial(yaml.safe_dump, sort_keys=False)
    return environment.get_template(template).render(context)


class LivePage:
    """Writes report.html of a run, at most once a minute, and the plots at the end."""

    def __init__(self, run: RunDirectory) -> None:
        """Start the minute before the first page."""
        self._run = run
        self._last_s = time.monotonic()

    def draw(self, record: Mapping[str, Any], *, final: bool) -> None:
        """Write the page, and the plots too if it is the final one.

        A failure is recorded and ignored, because a drawing must not end a run of hours;
        ``ray-surgeon report`` can repeat it later.
        """
        if not final and time.monotonic() - self._last_s < _PAGE_EVERY_S:
            return
        self._last_s = time.monotonic()
        try:
            files.write_text(self._run.path("report.html"), page([record]))
            if final:
                self._write_plots(record)
        except Exception as error:  # whatever a plotting library raises
            self._run.add_event({"step": "drawing failed", "reason": repr(error)})

    def _write_plots(self, record: Mapping[str, Any]) -> None:
        for name, figure in plots.run_figures(record).items():
            uri = self._run.path("plots", name)
            files.write_text(f"{uri}.svg", plots.inline_svg(figure, name))
            plots.save(figure, f"{uri}.png")
