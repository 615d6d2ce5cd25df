"""What a report.json says to its reader: a verdict, warnings, widths, and times.

Reports of earlier versions lack some entries; what depends on these is left out.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_surgeon.checkpointing import Record
from ray_surgeon.report.record import (
    dense_bytes,
    is_complete,
    num_shots,
    shots_by_size,
    source_bytes,
    structure_of,
)

LOWEST_AGREEMENT = 0.75
"""Agreement with the original below which a reader is warned."""
MOST_TIMES_PREDICTED = 3.0
"""Multiple of the predicted loss increase above which a reader is warned."""
LOOP_ANSWER_TOKENS = 64
"""Shortest limit of answers from which the absence of loops says something.

A loop covers at least 32 tokens, and an answer has a beginning.
"""
NO_CHANGE = 5e-4
"""Relative change of a perplexity or a size below which it counts as none."""
_NOTICED = 0.02
"""Relative change of a speed below which it counts as none."""
_LEAST_INCREASE = 0.02
"""Measured loss increase, in nats, that is compared with the prediction."""
_NAMED_TEXTS = 3
"""Most texts whose perplexities a sentence names."""


# Words


def megabytes(size_bytes: float) -> str:
    """Return a size for people, e.g. ``229.2 MB`` or ``15.2 GB``."""
    if size_bytes >= 1e10:
        return f"{size_bytes / 1e9:,.1f} GB"
    if size_bytes < 1e6:
        return f"{size_bytes / 1e3:,.1f} kB"
    return f"{size_bytes / 1e6:,.1f} MB"


def number_of(parameters: float) -> str:
    """Return a number of parameters for people, e.g. ``134.5 million``."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:,.2f} billion"
    if parameters >= 1e6:
        return f"{parameters / 1e6:,.1f} million"
    return f"{parameters / 1e3:,.1f} thousand"


def duration(seconds: float) -> str:
    """Return a time for people, e.g. ``45 s``, ``12.5 min`` or ``3.5 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 300:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def quantity(value: float) -> str:
    """Return a perplexity or a rate for people, with four digits or less."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e5:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}"


def faster(ratio: float) -> str:
    """Return the words for a ratio of speeds: ``10 % faster``, ``as fast``, ``5 % slower``."""
    if abs(ratio - 1) < _NOTICED:
        return "as fast"
    if ratio >= 2:
        return f"{ratio:.1f} times as fast"
    if ratio > 1:
        return f"{100 * (ratio - 1):.0f} % faster"
    return f"{100 * (1 - ratio):.0f} % slower"


def times(increase: float) -> str:
    """Return the factor of a perplexity for an increase of the loss in nats, e.g. ``x 1.13``."""
    return f"x {math.exp(increase):.2f}"


def _joined(parts: Sequence[str]) -> str:
    """Return parts as an enumeration: ``a``, ``a and b``, or ``a, b and c``."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


# The verdict


def verdict(record: Record) -> list[str]:
    """Return two sentences: what was removed and gained, and what it costs in quality."""
    if not record["shots"]:
        return ["No pruning round has ended yet."]
    return [_gain(record), _price(record)]


def _gain(record: Record) -> str:
    shot = record["shots"][-1]
    parameters = record["parameters"]
    before = number_of(parameters["before"])
    after = number_of(parameters["nonzero_after"])
    if structure_of(record) == "none":
        parts = [f"Nothing was removed from the model of {before} parameters"]
    else:
        parts = [
            f"{100 * shot['sparsity']:.1f} % of the weights of the model's blocks were "
            f"removed, which leaves {after} of {before} parameters"
        ]
    export = main_export(record)
    if export is None:
        yet = "" if is_complete(record) else " yet"
        return f"{parts[0]}; no export was written{yet}."
    whole = f"{megabytes(dense_bytes(record))} in {record['spec']['model']['dtype']}"
    if export["kind"] == "masked":
        size = megabytes(export["size_bytes"])
        parts.append(f"the masked export, in which they are zeros, has {size} as before")
    else:
        parts.append(
            f"the {export['kind']} export has {_sizes(record)} instead of {whole}"
        )
    if "speed" in export:
        speed = export["speed"]
        parts.append(
            f"prompts are read {_faster_or_scatter(speed, 'prefill')} and generation is "
            f"{_faster_or_scatter(speed, 'decode')}"
        )
    return f"{'; '.join(parts)}."


def _sizes(record: Record) -> str:
    """Return the sizes of the main export and of a quantised copy of it."""
    export = main_export(record)
    assert export is not None
    sizes = megabytes(export["size_bytes"])
    for copy in record["exports"]:
        is_copy = copy["kind"].startswith(f"{export['kind']}-")
        if is_copy and copy.get("size") == export.get("size"):
            sizes += f" ({copy['kind']}: {megabytes(copy['size_bytes'])})"
    return sizes


def _faster_or_scatter(speed: Record, step: str) -> str:
    """Return the words for a speed, which say whether the difference is below the scatter."""
    ratio = speed[f"{step}_ratio"]
    dense = speed["dense"][f"{step}_tokens_per_s"]
    pruned = speed["pruned"][f"{step}_tokens_per_s"]
    has_overlap = (
        pruned["lowest"] <= dense["highest"] and dense["lowest"] <= pruned["highest"]
    )
    if has_overlap and abs(ratio - 1) >= _NOTICED:
        return f"{faster(ratio)} (within the scatter of the repeats)"
    return faster(ratio)


def _price(record: Record) -> str:
    shot = record["shots"][-1]
    dense = record["dense"]["perplexity"]
    changes = list[str]()
    verb = "goes "
    for text, before in list(dense.items())[:_NAMED_TEXTS]:
        after = shot["perplexity"][text]
        if abs(after / before - 1) < NO_CHANGE:
            changes.append(f"stays at {quantity(before)} on {text}")
            verb = "goes "
        else:
            change = f"from {quantity(before)} to {quantity(after)} ({percent(after / before)})"
            changes.append(f"{verb}{change} on {text}")
            verb = ""  # is not said again
    sentence = f"Perplexity {_joined(changes)}"
    if len(dense) > _NAMED_TEXTS:
        sentence += f", with {len(dense) - _NAMED_TEXTS} more texts below"
    generation = shot.get("generation")
    if generation:
        sentence += (
            f"; agreement with the original's answers is "
            f"{100 * generation['acceptance']:.1f} %"
        )
    return f"{sentence}."


def percent(ratio: float) -> str:
    """Return a ratio as a signed change, e.g. ``+13.2 %``."""
    if not math.isfinite(ratio):
        return str(ratio)
    return f"{100 * (ratio - 1):+.1f} %"


def exports_by_round(record: Record) -> dict[int, Record]:
    """Return number of a pruning round -> its export: the last one of those that the spec names."""
    exports = dict[int, Record]()
    if not record["shots"]:
        return exports
    kinds = record["spec"]["output"]["exports"]
    for size, shot in shots_by_size(record).items():
        of_size = [each for each in record["exports"] if each.get("size") == size]
        named = [export for export in of_size if export["kind"] in kinds]
        if of_size:
            exports[shot["index"]] = (named or of_size)[-1]
    return exports


def main_export(record: Record) -> Record | None:
    """Return the export that the verdict is about, of the last size that has one."""
    exports = exports_by_round(record)
    if not exports:
        return None
    return exports[max(exports)]


def warnings(record: Record) -> list[str]:
    """Return what a reader should know before using the model, one or two sentences each."""
    if not record["shots"]:
        return []
    found = [
        _warning_of_agreement(record),
        _warning_of_size(record),
        _warning_of_prediction(record),
    ]
    return [warning for warning in found if warning]


def _warning_of_agreement(record: Record) -> str:
    generation = record["shots"][-1].get("generation")
    if not generation or generation["acceptance"] >= LOWEST_AGREEMENT:
        return ""
    return (
        f"Agreement with the original is {100 * generation['acceptance']:.1f} %, below "
        f"{100 * LOWEST_AGREEMENT:.0f} %: answers will differ noticeably. Remove less, calibrate "
        "on more text, or train longer (recovery.num_tokens)."
    )


def _warning_of_size(record: Record) -> str:
    export = main_export(record)
    if export is None:
        return ""
    given = source_bytes(record)
    smallest = min(each["size_bytes"] for each in record["exports"])
    for each in record["exports"]:
        for file in each.get("files", ()):
            smallest = min(smallest, file["size_bytes"])
    if smallest < given:
        return ""
    stated = (
        f"The {export['kind']} export ({megabytes(export['size_bytes'])}) is not smaller than "
        f"the weights that were given ({megabytes(given)})"
    )
    if export["kind"] == "masked":
        return (
            f"{stated}: it keeps all shapes, and removed weights are zeros in it. "
            "pruning.structure: groups with output.exports: [uniform] gives smaller files."
        )
    if given < 0.9 * dense_bytes(record):
        dtype = record["spec"]["model"]["dtype"]
        return (
            f"{stated}: the given file has fewer bits per weight than {dtype}. A gguf export, or "
            "output.quantize, writes fewer bits, too."
        )
    return f"{stated}."


def _warning_of_prediction(record: Record) -> str:
    predicted = predicted_increase(record)
    measured = measured_increases(record, record["shots"][-1])
    if predicted is None or not measured:
        return ""
    text, highest = max(measured.items(), key=lambda item: item[1])
    if highest < max(_LEAST_INCREASE, MOST_TIMES_PREDICTED * predicted):
        return ""
    calibration = record["spec"]["calibration"]  # not null, as there is a prediction
    num_tokens = calibration["num_sequences"] * calibration["sequence_length"]
    return (
        f"The loss on {text} rose by {highest:.2f} nats, but {predicted:.2g} were predicted from "
        f"{num_tokens:,} tokens of calibration text: that is too little text, or text of another "
        "kind (calibration.num_sequences, calibration.source)."
    )


# Loss increases


def predicted_increase(record: Record, num_rounds: int | None = None) -> float | None:
    """Return the sum of the predicted loss increases, in nats per token.

    Args:
        record: content of report.json.
        num_rounds: number of pruning rounds to sum over; None for all.

    Returns:
        The sum; None if a round has no prediction.
    """
    total = 0.0
    for shot in record["shots"][:num_rounds]:
        increase = shot.get("predicted_loss_increase")
        if increase is None:
            return None
        total += increase
    return total


def measured_increases(record: Record, shot: Record) -> dict[str, float]:
    """Return text -> increase of the loss over the dense model's, in nats per token."""
    increases = dict[str, float]()
    for text, before in record["dense"]["perplexity"].items():
        after = shot["perplexity"].get(text, math.inf)
        if math.isfinite(before) and math.isfinite(after):
            increases[text] = math.log(after / before)
    return increases


def loss_curve(record: Record) -> list[tuple[float, float]]:
    """Return (sparsity, predicted loss increase over the dense model) in ascending order.

    The curve follows the greedy paths of every round up to the round's sparsity, and those of the
    last round as far as they were followed. Without paths it has one point for every round. It is
    empty where a round has no prediction.
    """
    points = [(0.0, 0.0)]
    before = 0.0
    shots = record["shots"]
    for number, shot in enumerate(shots, start=1):
        increase = shot.get("predicted_loss_increase")
        if increase is None:
            return []
        is_last = number == len(shots)
        for sparsity, cost in shot.get("loss_curve", ()):
            is_new = sparsity > points[-1][0]
            if is_new and (is_last or sparsity < shot["sparsity"]):
                points.append((sparsity, before + cost))
        before += increase
        if shot["sparsity"] > points[-1][0]:
            points.append((shot["sparsity"], before))
    return points


def loss_at(curve: Sequence[tuple[float, float]], sparsity: float) -> float:
    """Return the loss increase at a sparsity on a curve, between its points linearly."""
    sparsities = [point[0] for point in curve]
    increases = [point[1] for point in curve]
    return float(np.interp(sparsity, sparsities, increases))


@dataclass(frozen=True)
class Reach:
    """What removing a share of the weights would cost."""

    sparsity: float
    size_bytes: float  # of the weights in the dtype of the run
    increase: float  # predicted, in nats per token
    is_measured: bool = False  # whether the run, or a size of it, is there
    speeds: str = ""  # measured speed in words; empty if there is none


def reaches(record: Record) -> list[Reach]:
    """Return rows of a table of sizes: round sparsities, and those that the run has reached."""
    curve = loss_curve(record)
    if len(curve) < 3:
        return []
    end = curve[-1][0]
    step = next(each for each in (0.02, 0.05, 0.1, 1.0) if end / each <= 8)
    measured = dict[float, str]()
    for size, shot in shots_by_size(record).items():
        speeds = ""
        for export in record["exports"]:
            if export.get("size") == size and "speed" in export:
                speeds = speed_words(export["speed"])
        measured[shot["sparsity"]] = speeds
    sparsities = set(measured)
    for number in range(1, math.floor(end / step + 1e-9) + 1):
        if all(abs(number * step - other) > 0.2 * step for other in measured):
            sparsities.add(number * step)
    rows = []
    for sparsity in sorted(sparsities):
        rows.append(
            Reach(
                sparsity=sparsity,
                size_bytes=bytes_at(record, sparsity),
                increase=loss_at(curve, sparsity),
                is_measured=sparsity in measured,
                speeds=measured.get(sparsity, ""),
            )
        )
    return rows


def bytes_at(record: Record, sparsity: float) -> float:
    """Return the bytes of the weights without a fraction of the blocks' linears."""
    parameters = record["parameters"]
    in_linears = parameters["in_pruned_linears"] / parameters["before"]
    return dense_bytes(record) * float(1 - sparsity * in_linears)


def speed_words(speed: Record) -> str:
    """Return the speed of an export in words, e.g. ``prompts 14 % faster, generation as fast``."""
    prompts = faster(speed["prefill_ratio"])
    generation = faster(speed["decode_ratio"])
    return f"prompts {prompts}, generation {generation}"


# Widths


@dataclass(frozen=True)
class Widths:
    """Groups of one kind that are left in every block."""

    name: str  # e.g. ``feed-forward channels``
    before: int  # in a block of the dense model
    left: tuple[float, ...]  # by block; NaN where a block has none of this kind

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks have the same width."""
        return len({each for each in self.left if not math.isnan(each)}) == 1


def widths_of(record: Record) -> list[Widths]:
    """Return the widths of every kind of coupled groups; empty for other structures."""
    removed = defaultdict[str, int](int)
    for shot in record["shots"]:
        for consumer, count in shot.get("groups_removed", {}).items():
            removed[consumer] += count
    by_place = defaultdict[str, list[Mapping[str, Any]]](list)
    for linear in record["linears"]:
        if linear["name"] in removed:
            by_place[_place_of(linear["name"])[1]].append(linear)
    by_name = defaultdict[str, list[tuple[str, Widths]]](list)
    for place, linears in by_place.items():
        size = _columns_of_a_group(linears, removed)
        if size is not None:
            widths = _widths_of_place(record, place, linears, size)
            by_name[widths.name].append((place, widths))
    found = list[Widths]()
    for name, alike in by_name.items():
        for place, widths in alike:
            if len(alike) > 1:  # for instance blocks with experts and blocks without
                widths = replace(widths, name=f"{name} before {place}")
            found.append(widths)
    return found


def _columns_of_a_group(
    linears: Sequence[Record], removed: Mapping[str, int]
) -> int | None:
    """Return the number of columns that a group has; None if none was removed."""
    for linear in linears:
        lost = linear["columns"] - linear["columns_kept"]
        count = removed[linear["name"]]
        if lost >= count > 0:
            return int(lost) // count
    return None


def _widths_of_place(
    record: Record, place: str, linears: Sequence[Record], size: int
) -> Widths:
    by_block = defaultdict[int, list[float]](list)
    before = 0
    for linear in linears:
        block, _ = _place_of(linear["name"])
        columns = linear["columns"]
        if _has_bias(record, linear):
            columns -= 1
        before = columns // size
        by_block[block].append(
            (linear["columns_kept"] - linear["columns"] + columns) / size
        )
    left = list[float]()
    for block in range(max(by_block) + 1):
        left.append(statistics.fmean(by_block.get(block, [math.nan])))
    if ".*." in place:
        name = "channels per expert, on average"
    elif size == 1:
        name = "feed-forward channels"
    else:
        name = "attention heads (KV groups)"
    return Widths(name=name, before=before, left=tuple(left))


def _place_of(name: str) -> tuple[int, str]:
    """Return the block of a linear and its place there, where experts are one place."""
    _, block, place = re.split(r"\.(\d+)\.", name, maxsplit=1)
    return int(block), re.sub(r"\.\d+\.", ".*.", place)


def _has_bias(record: Record, consumer: Record) -> bool:
    """Whether the columns of a consumer include a bias, which the rows of its producers lack."""
    without = consumer["columns"] - 1
    parent = consumer["name"].rpartition(".")[0]
    for linear in record["linears"]:
        is_beside = linear["name"].rpartition(".")[0] == parent
        # gate and up may be one linear
        if is_beside and linear["rows"] in (without, 2 * without):
            return True
    return False


def widths_line(widths: Widths) -> str:
    """Return a sentence on widths that all blocks share, or on their range."""
    there = [each for each in widths.left if not math.isnan(each)]
    if widths.is_uniform:
        return f"Every block has {there[0]:,.4g} of {widths.before:,} {widths.name}."
    return (
        f"Blocks have {min(there):,.4g} to {max(there):,.4g} of {widths.before:,} "
        f"{widths.name}."
    )


# Time


@dataclass(frozen=True)
class Phase:
    """A part of a run with the wall time of its steps."""

    name: str  # ``start``, ``round 1`` or ``exports``
    seconds: Mapping[str, float]  # by step

    @property
    def total_s(self) -> float:
        """Wall time of all steps."""
        return sum(self.seconds.values())


def phases(record: Record) -> list[Phase]:
    """Return the parts of a run in their order: the start, every pruning round, the exports.

    Reports of earlier versions have the rounds only.
    """
    if "steps" not in record:
        return [Phase(f"round {s['index']}", s["seconds"]) for s in record["shots"]]
    by_name = defaultdict[str, dict[str, float]](dict)
    by_name["start"] = {}
    is_committed = False  # whether the last round is
    for event in record["steps"]:
        step = event["step"]
        shot = event["shot"]
        # a run that resumes loads its last commit
        if not shot or (step == "load" and not is_committed):
            name = "start"
        elif is_committed:
            name = "exports"
        else:
            name = f"round {shot}"
        seconds = by_name[name]
        seconds[step] = seconds.get(step, 0.0) + event["seconds"]
        is_last = shot == num_shots(record)
        is_committed = is_committed or (step == "commit" and is_last)
    return [Phase(name, seconds) for name, seconds in by_name.items() if seconds]


def wall_s(record: Record) -> float:
    """Return the wall time of all steps of a run."""
    return sum(phase.total_s for phase in phases(record))


def answers_are_too_short(record: Record) -> bool:
    """Whether the answers are so short that a loop would hardly be seen in them."""
    settings = record["fingerprints"].get("generation") or {}
    longest = settings.get("max_new_tokens")
    return longest is not None and longest < LOOP_ANSWER_TOKENS
