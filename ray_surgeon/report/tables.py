"""Tables of a report: the pruning rounds, the answers, and the steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_surgeon.checkpointing import Record
from ray_surgeon.report.findings import (
    answers_are_too_short,
    duration,
    faster,
    main_export,
    megabytes,
    phases,
    quantity,
    wall_s,
)
from ray_surgeon.report.record import dense_bytes, num_shots, structure_of, texts_of


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
