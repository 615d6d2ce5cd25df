"""The end of a run in about ten lines: size, quality, speed, where it is, how to use it.

Sizes are compared with the files that were given, and a result that disappoints says so first.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ray_surgeon.config.sections import GenerationSection
from ray_surgeon.report import record as reports
from ray_surgeon.report.html_report import excerpt
from ray_surgeon.report.wording import counted, number, percent, perplexity, size
from ray_surgeon.storage import files

Record = Mapping[str, Any]
Row = tuple[str, str]
"""What a line is about, and what it says."""

LOW_AGREEMENT = 0.75
"""Agreement with the original's answers below which the summary warns."""
_MOST_RATIO = 3.0
"""Measured divergence relative to the predicted one, above which the summary warns."""
_LOOP_TOKENS = 64
"""Tokens of an answer from which on a loop can be told."""


def summary_lines(record: Record, uri: str) -> list[str]:
    """Return the last lines of a run: warnings, and then a line for each subject.

    They may hold texts of users and models: print them without markup.

    Args:
        record: content of report.json.
        uri: the run directory.
    """
    lines = [f"warning: {warning}" for warning in warnings(record)]
    rows = [
        *_size_rows(record),
        *_quality_rows(record),
        *_speed_rows(record),
        *_use_rows(record),
        *_next_rows(record, uri),
    ]
    before = ""
    for label, text in rows:
        lines.append(f"{'' if label == before else label:<12} {text}")
        before = label
    return lines


def warnings(record: Record) -> list[str]:
    """Return what is not as good as a user expects, and why.

    Args:
        record: content of report.json.
    """
    found = list[str]()
    for export in record["exports"]:
        found.extend(_not_smaller(record, export))
    if not record["shots"]:
        return found
    generation = record["shots"][-1].get("generation")
    if generation and generation["acceptance"] < LOW_AGREEMENT:
        found.append(
            f"agreement with the original is {percent(generation['acceptance'])}, below "
            f"{100 * LOW_AGREEMENT:g} %: read some answers before you use the model; prune less, "
            "or train longer"
        )
    found.extend(_unlike_prediction(record))
    return found


def _not_smaller(record: Record, export: Record) -> Iterator[str]:
    """Yield why an export is not smaller than the file that was given, if it is not."""
    given = reports.source_bytes(record)
    written = export["size_bytes"]
    if written < given or not record["spec"]["pruning"]:
        return
    what = (
        f"the export {export['kind']} is not smaller than the source: {size(written)}, and "
        f"{size(given)} were given"
    )
    num_bits = 8 * given / record["parameters"]["before"]
    dtype = record["spec"]["model"]["dtype"]
    dtype_bits = 8 * getattr(torch, dtype).itemsize
    if export["kind"] == "masked":
        remedy = "give pruning.structure groups"
        if _possible(record):
            remedy = f"export {_possible(record)[0]}"
        yield f"{what}. It keeps the removed weights as zeros; {remedy}"
    elif num_bits < 0.9 * dtype_bits and "files" not in export:
        yield (
            f"{what}. The source has {num_bits:.1f} bits per weight"
            f"{_if_gguf(record)}, the export {dtype_bits} ({dtype}); "
            f"{_remedy(num_bits)}"
        )
    else:
        yield f"{what}. Prune more, or choose a smaller type"


def _if_gguf(record: Record) -> str:
    return " (a GGUF file)" if record["spec"]["model"]["source"].endswith(".gguf") else ""


def _remedy(num_bits: float) -> str:
    """Return how an export comes nearer to a source of that many bits per weight."""
    if num_bits > 12:
        return "set model.dtype to bfloat16"
    return "export gguf with output.gguf: [q4_0], or set output.quantize"


def _unlike_prediction(record: Record) -> Iterator[str]:
    """Yield a warning if the update did more harm than its prediction, which comes of little text.

    Both are in nats per token; the predictions of all rounds are added.
    """
    measured = record["shots"][-1].get("divergence_held_aside")
    predicted = 0.0
    for shot in record["shots"]:
        predicted += shot.get("predicted_loss_increase") or 0.0
    if measured is None or predicted <= 0 or measured <= _MOST_RATIO * predicted:
        return
    calibration = record["spec"]["calibration"]
    num_tokens = calibration["num_sequences"] * calibration["sequence_length"]
    yield (
        f"the predicted loss increase is {predicted:.3f} nats per token, the measured divergence "
        f"{measured:.3f}, more than {_MOST_RATIO:g} times that: {num_tokens:,} tokens are too "
        "little calibration text; raise calibration.num_sequences"
    )


def _change(before: float, after: float) -> str:
    """Return how much smaller or larger a size has become."""
    if not before:
        return ""
    ratio = after / before
    if abs(ratio - 1) < 0.005:
        return ", the same size"
    if ratio < 1:
        return f", {100 * (1 - ratio):.0f} % smaller"
    return f", {100 * (ratio - 1):.0f} % larger"


def _size_rows(record: Record) -> Iterator[Row]:
    given = reports.source_bytes(record)
    for export in record["exports"]:
        for name, written in _written(record, export):
            change = _change(given, written)
            yield "size", f"{size(given)} -> {size(written)}{change} ({name})"
    parameters = record["parameters"]
    before = number(parameters["before"])
    if record["spec"]["pruning"]:
        after = number(parameters["nonzero_after"])
        rounds = counted(len(record["shots"]), "pruning round")
        yield "parameters", f"{before} -> {after}, in {rounds}"


def _written(record: Record, export: Record) -> Iterator[tuple[str, int]]:
    """Yield the name and the bytes of what an export has written."""
    name = export["kind"]
    if "size" in export:
        name += f" at {reports.size_name(record, export['size'])}"
    if "files" not in export:
        yield name, export["size_bytes"]
    for file in export.get("files", ()):
        yield file["file"], file["size_bytes"]


def _quality_rows(record: Record) -> Iterator[Row]:
    if not record["shots"]:
        return
    last = record["shots"][-1]
    for size_, shot in reports.shots_by_size(record).items():
        at = "" if size_ is None else f" (at {reports.size_name(record, size_)})"
        yield from _perplexity_rows(record, shot, at)
    if last.get("divergence"):
        values = [f"{text} {value:.3f}" for text, value in last["divergence"].items()]
        yield "divergence", f"{', '.join(values)} nats per token"
    for export in record["exports"]:
        if "perplexity" in export:  # a quantised copy has its own
            yield from _perplexity_rows(record, export, f" ({export['kind']})")
    generation = last.get("generation")
    if generation:
        yield from _answer_rows(record, generation)
    for export in record["exports"]:
        yield from _task_rows(record, export)


def _perplexity_rows(record: Record, measured: Record, suffix: str) -> Iterator[Row]:
    texts = []
    for text, before in record["dense"]["perplexity"].items():
        after = measured["perplexity"][text]
        texts.append(f"{text} {perplexity(before)} -> {perplexity(after)}")
    if texts:
        yield "perplexity", f"{', '.join(texts)}{suffix}"


def _answer_rows(record: Record, generation: Record) -> Iterator[Row]:
    mean = generation["tokens_until_departure"]["mean"]
    yield (
        "answers",
        f"agreement with the original {percent(generation['acceptance'])}; "
        f"greedy answers agree for {mean:.1f} tokens on average",
    )
    about = []
    if generation.get("not_ended") is not None:
        share = f"{100 * generation['not_ended']:.0f} %"
        about.append(f"{share} of the answers that the original ended do not end")
    if _longest_answer(record) >= _LOOP_TOKENS:
        about.append(f"{100 * generation['repeating']:.0f} % are caught in a loop")
    else:
        about.append("they are too short to tell loops")
    yield "answers", "; ".join(about)
    example = generation.get("example")
    if example:
        yield "original", excerpt(example["dense"], 100)
        yield "pruned", excerpt(example["pruned"], 100)


def _longest_answer(record: Record) -> int:
    """Return the most tokens of an answer, or the default if the spec leaves that open."""
    section = record["spec"]["evaluation"].get("generation")
    if isinstance(section, Mapping):
        return int(section["max_new_tokens"])
    return GenerationSection().max_new_tokens


def _task_rows(record: Record, export: Record) -> Iterator[Row]:
    for task, metrics in export.get("tasks", {}).items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                before = record["dense"]["tasks"][task][metric]
                yield "tasks", f"{task} {metric} {before:.3f} -> {value:.3f}"


def _speed_rows(record: Record) -> Iterator[Row]:
    for export in record["exports"]:
        if "speed" not in export:
            continue
        speed = export["speed"]
        dense = speed["dense"]
        pruned = speed["pruned"]
        parts = []
        for name, step in (("generation", "decode"), ("prompts", "prefill")):
            rate = f"{step}_tokens_per_s"
            parts.append(
                f"{name} {_faster(dense[rate]['median'], pruned[rate]['median'])}"
            )
        before = dense["peak_gpu_bytes"] or dense["peak_rss_bytes"]
        after = pruned["peak_gpu_bytes"] or pruned["peak_rss_bytes"]
        parts.append(f"memory {size(before)} -> {size(after)}")
        suffix = f" ({export['kind']})" if len(record["exports"]) > 1 else ""
        yield "speed", f"{', '.join(parts)}{suffix}"


def _faster(before: float, after: float) -> str:
    """Return a change of a rate, e.g. ``10 % faster``."""
    change = 100 * (after / before - 1)
    if round(change) == 0:
        return "as fast"
    return f"{abs(change):.0f} % {'faster' if change > 0 else 'slower'}"


def _use_rows(record: Record) -> Iterator[Row]:
    """Yield where each export is, how to load it in Python, and how to serve it."""
    for export in record["exports"]:
        yield "where", export["uri"]
        if "from_pretrained" in export["load"]:
            yield "load", export["load"]
        command = serve_command(export)
        if command:
            yield "serve", command


def serve_command(export: Record) -> str:
    """Return the command that serves an export; empty if no engine here loads it.

    Args:
        export: an entry of ``exports`` in report.json.
    """
    uri = export["uri"]
    if export.get("files"):
        return f"llama-server -m {_quoted(files.join(uri, export['files'][0]['file']))}"
    if not files.is_local(uri):
        return ""
    loaders = export.get("loaders", {})
    command = f"vllm serve {_quoted(uri)}"
    if "vLLM with --trust-remote-code" in loaders:
        return f"{command} --trust-remote-code"
    how = loaders.get("vLLM", "not run")
    if how == "not run":
        return ""
    if how.startswith("with --model-impl transformers"):
        return f"{command} --model-impl transformers"
    return command


def _quoted(word: str) -> str:
    return shlex.quote(word)


def _next_rows(record: Record, uri: str) -> Iterator[Row]:
    """Yield commands to go on with, and where the report is."""
    kinds = [export["kind"] for export in record["exports"]]
    further = [kind for kind in _possible(record) if kind not in kinds]
    if further:
        yield "go on", f"ray-surgeon export {_quoted(uri)} --exports {further[0]}"
    trainable = [kind for kind in ("uniform", "masked") if kind in kinds]
    if trainable and record["spec"]["pruning"]:
        export = files.join(uri, "export", trainable[0])
        source = record["spec"]["model"]["source"]
        yield (
            "go on",
            f"ray-surgeon recover {_quoted(export)} --teacher {_quoted(source)}",
        )
    yield "report", files.join(uri, "report.html")


def _possible(record: Record) -> Sequence[str]:
    """Return kinds of exports that make the model of a run smaller."""
    pruning = record["spec"]["pruning"]
    if pruning is None:
        return ("uniform", "gguf")
    if pruning["structure"] != "groups":
        return ()
    if pruning.get("allocation") == "uniform":
        return ("uniform", "gguf")
    return ("per_block",)


def headline(record: Record) -> tuple[str, str]:
    """Return size and quality of a run, each in a line.

    Args:
        record: content of report.json.
    """
    sizes = [text for label, text in _size_rows(record) if label == "size"]
    parameters = record["parameters"]
    sizes.append(
        f"{number(parameters['before'])} -> {number(parameters['nonzero_after'])} parameters"
    )
    quality = [text for _, text in _perplexity_rows(record, record["shots"][-1], "")]
    if quality:
        quality[0] = f"perplexity {quality[0]}"
    generation = record["shots"][-1].get("generation")
    if generation:
        quality.append(f"agreement with the original {percent(generation['acceptance'])}")
    return "; ".join(sizes), "; ".join(quality)
