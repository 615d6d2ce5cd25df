"""What a step of a run says to a person: step name -> function of its facts -> sentence.

The facts themselves are in events.jsonl. A fact that is not of interest, such as a count of 0, is
left out; a step without words of its own shows ``key=value``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Facts = Mapping[str, Any]
"""Facts of a step by name, as in the events."""

_VALIDATION = "divergence on validation text"


def sentence(step: str, facts: Facts) -> str:
    """Return what a step found, in plain words; empty if that is nothing of interest.

    Args:
        step: name of the step, e.g. "update".
        facts: of its event.
    """
    words = _WORDS.get(step)
    if words is None:
        return _pairs(facts)
    return words(facts)


def parts_of(*parts: str) -> str:
    """Return the parts that are not empty, separated by commas."""
    return ", ".join(part for part in parts if part)


def number(value: float) -> str:
    """Return a count with a prefix for thousands, e.g. ``86.3 M``."""
    if value < 1e4:
        return f"{value:.6g}"
    for unit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.1f} {prefix}"
    return f"{value / 1e3:.1f} K"


def size(num_bytes: float) -> str:
    """Return a size in decimal units, e.g. ``229 MB``."""
    for unit_bytes, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if num_bytes >= unit_bytes:
            value = num_bytes / unit_bytes
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage, e.g. ``18.8 %``."""
    return f"{100 * fraction:.1f} %"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, e.g. ``1 layer`` or ``2 layers``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """Return a duration, e.g. ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def perplexity(value: float) -> str:
    """Return a perplexity, e.g. ``12.053``."""
    return f"{value:.3f}" if value < 1e4 else f"{value:.3g}"


def _pairs(facts: Facts) -> str:
    pairs = []
    for key, value in facts.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        pairs.append(f"{key}={shown}")
    return "  ".join(pairs)


def _by_text(facts: Facts, measure: str) -> dict[str, float]:
    """Return text -> value of the facts ``MEASURE TEXT``."""
    found = {}
    for key, value in facts.items():
        name, _, text = key.partition(" ")
        if name == measure and text:
            found[text] = value
    return found


def _rate(facts: Facts) -> str:
    if "tokens_per_s" not in facts:
        return ""
    return f"{facts['tokens_per_s']:.0f} tokens/s"


def _plan(facts: Facts) -> str:
    places = []
    for tensors in ("weights", "factors", "teacher"):
        if tensors in facts:
            places.append(f"{tensors} on the {facts[tensors]}")
    peak = ""
    if "peak_gib" in facts:
        peak = f"at most {facts['peak_gib']:.2f} GiB a worker"
    return parts_of(*places, peak)


def _load(facts: Facts) -> str:
    if facts.get("size"):
        return f"weights of the size {facts['size']:g}"
    workers = counted(facts.get("workers", 1), "worker")
    if "resumed_in_shot" in facts:
        round_, _, after = str(facts["resumed_in_shot"]).partition(", ")
        return f"{workers}, continuing in round {round_} {after}"
    if facts.get("resumed_after_shot"):
        return f"{workers}, continuing after round {facts['resumed_after_shot']}"
    return workers


def _sampling(facts: Facts) -> str:
    written = ""
    if "num_sequences" in facts:
        windows = counted(facts["num_sequences"], "window")
        written = f"the model wrote {windows} of calibration text"
    answers = ""
    if "share of answers" in facts:
        answers = f"{percent(facts['share of answers'])} of it answers"
    return parts_of(written, answers)


def _answers(facts: Facts) -> str:
    if "accepted" not in facts:
        prompts = counted(facts.get("prompts", 0), "prompt")
        return parts_of(f"the original model answered {prompts}", _rate(facts))
    agreement = f"agreement with the original {percent(facts['accepted'])}"
    if "agreement" not in facts:
        return f"{agreement} before the recovery"
    return f"{agreement}, same most likely token {percent(facts['agreement'])}"


def _evaluation(facts: Facts) -> str:
    divergence = _by_text(facts, "divergence")
    texts = []
    for text, value in _by_text(facts, "perplexity").items():
        part = f"{text} {perplexity(value)}"
        if text in divergence:
            part += f" (divergence {divergence[text]:.3f})"
        texts.append(part)
    whose = "" if divergence else "original model: "
    return f"{whose}perplexity {', '.join(texts)}" if texts else ""


def _depth(facts: Facts) -> str:
    removed = facts.get("removed")
    layers = f"removed {removed}" if removed else "no layer removed"
    return parts_of(layers, _after(facts))


def _after(facts: Facts) -> str:
    """Return the divergence on the validation windows after a step, if it was measured."""
    if "divergence held aside" not in facts:
        return ""
    return f"{_VALIDATION} {facts['divergence held aside']:.3f}"


def _curvature(facts: Facts) -> str:
    loss = ""
    if "calibration_loss" in facts:
        loss = f"loss on calibration text {facts['calibration_loss']:.3f}"
    damping = f"damping {facts['damping']}" if "damping" in facts else ""
    return parts_of(loss, damping, _rate(facts))


def _costs(facts: Facts) -> str:
    raised = facts.get("damping_raised", 0)
    return f"damping raised for {counted(raised, 'factor')}" if raised else ""


_UNITS = {"parameters of the linears": "weights", "flops": "operations per token"}
"""Unit of a target -> its name in a sentence."""


def _kept(facts: Facts) -> str:
    """Return what a target leaves of the model."""
    if "need" not in facts:
        return ""
    unit = facts.get("unit", "")
    if unit == "bytes":
        return f"keeping {size(facts['need'])}"
    return f"keeping {number(facts['need'])} {_UNITS.get(unit, unit)}"


def _threshold(facts: Facts) -> str:
    groups = counted(facts["groups"], "group") if "groups" in facts else ""
    experts = counted(facts["experts"], "expert") if facts.get("experts") else ""
    removed = ""
    if "sparsity" in facts:
        removed = f"{percent(facts['sparsity'])} of the linears' parameters to remove"
    return parts_of(removed, groups, experts, _kept(facts))


def _update(facts: Facts) -> str:
    removed = f"{percent(facts['sparsity'])} of the linears' parameters removed"
    predicted = ""
    if "predicted_loss_increase" in facts:
        predicted = f"predicted loss increase {facts['predicted_loss_increase']:.3f}"
    return parts_of(removed, predicted, _after(facts))


def _reconstruction(facts: Facts) -> str:
    layers = facts.get("layers", 0)
    undone = facts.get("layers undone", 0)
    improved = f"{layers - undone} of {counted(layers, 'layer')} improved"
    error = facts.get("error held aside", 1.0)
    smaller = ""
    if error < 1:
        smaller = f"their error on validation text {percent(1 - error)} smaller"
    return parts_of(improved, smaller)


def _recovery(facts: Facts) -> str:
    measure = _VALIDATION
    if "measure" in facts:
        measure = f"{facts['measure']} on validation text"
    change = ""
    if "held aside before" in facts:
        before = facts["held aside before"]
        change = f"{measure} {before:.3f} -> {facts['held aside after']:.3f}"
    elif "first_loss" in facts:
        first = facts["first_loss"]
        change = f"training loss {first:.3f} -> {facts['last_loss']:.3f}"
    steps = counted(facts.get("num_steps", 0), "step")
    undone = f"rolled back: {facts['undone']}" if "undone" in facts else ""
    ended = f"ended early: {facts['ended']}" if "ended" in facts else ""
    return parts_of(change, steps, undone, ended)


def _check(facts: Facts) -> str:
    tokens = f"after {number(facts['tokens'])} tokens"
    if not facts["tokens"]:
        tokens = "before training"
    measure = _VALIDATION if "acceptance" in facts else "loss on validation text"
    held = agreement = ""
    if "held_aside" in facts:
        held = f"{measure} {facts['held_aside']:.4f}"
    if "acceptance" in facts:
        agreement = f"agreement with the original {percent(facts['acceptance'])}"
    peak = ""
    if "share_of_peak" in facts:
        peak = f"{percent(facts['share_of_peak'])} of the device's peak"
    return f"{tokens}: {parts_of(held, agreement, _rate(facts), peak)}"


def _commit(facts: Facts) -> str:
    return f"saved, {number(facts['parameters'])} parameters"


def _export(facts: Facts) -> str:
    reloaded = ""
    difference = facts.get("reload_max_logit_difference")
    if difference == 0:
        reloaded = "reloaded: equal outputs"
    elif difference is not None:
        reloaded = (
            f"reloaded: outputs equal up to rounding (logits within {difference:.2g})"
        )
    return parts_of(f"{facts['kind']}", size(facts["size_bytes"]), reloaded)


def _retry(facts: Facts) -> str:
    return f"continuing after the loss of {facts['cause']}: {facts['message']}"


_WORDS: dict[str, Callable[[Facts], str]] = {
    "plan": _plan,
    "load": _load,
    "sampling": _sampling,
    "answers": _answers,
    "evaluation": _evaluation,
    "depth": _depth,
    "curvature": _curvature,
    "costs": _costs,
    "threshold": _threshold,
    "update": _update,
    "reconstruction": _reconstruction,
    "recovery": _recovery,
    "check": _check,
    "commit": _commit,
    "export": _export,
    "quantise": _export,
    "retry": _retry,
}
"""Step -> function from its facts to what it says."""
