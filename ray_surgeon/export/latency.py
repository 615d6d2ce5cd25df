"""How long a block of a given width takes, measured once a width.

The first worker's machine measures; the run directory keeps the result.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ray_surgeon.export.folder import Pruned, dense_document
from ray_surgeon.export.for_engines import Shrinking
from ray_surgeon.export.kinds import SHIPPED, shipped_source
from ray_surgeon.export.speed import device_name, random_model, timed
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.families import family_of
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, per_block_document
from ray_surgeon.runtime.fresh_process import run_on_worker
from ray_surgeon.spec.targets import LatencyTarget, SpeedSection
from ray_surgeon.storage import files

_BLOCKS_AT_ONCE = 8
"""Of one timed model, so that it fits where the whole model might not."""


def latency_budget(dense: Pruned, target: LatencyTarget, shrinking: Shrinking, uri: str) -> Budget:
    """Return the latency of a model as a sum over its blocks.

    Args:
        dense: the model; the first worker measures.
        target: what is measured.
        shrinking: which widths are measured.
        uri: a JSON file; what it holds already, measured with the same options, is not measured
            again.

    Raises:
        RuntimeError: the measuring process fails.
    """
    layout = dense.layout
    channels = shrinking.channels(layout)
    heads = shrinking.kv_heads(layout)
    widths = [[number, heads[-1]] for number in channels]
    widths += [[channels[-1], number] for number in heads[:-1]]
    about = target.model_dump(mode="json", exclude={"latency_s"})
    about |= {"dtype": dense.model.dtype} | asdict(shrinking)
    kept: dict[str, Any] = files.read_json(uri) if files.exists(uri) else {}
    if kept.get("options") != about or kept.get("widths") != widths:
        request = about | {"document": dense_document(dense.model), "widths": widths}
        kept = {"options": about, "widths": widths} | _measured(dense, request)
        files.write_json(uri, kept)
    of_channels = kept["seconds"][: len(channels)]
    whole = of_channels[-1]
    of_heads = [seconds - whole for seconds in (*kept["seconds"][len(channels) :], whole)]
    by_left = {"ffn": _table(channels, of_channels), "attention": _table(heads, of_heads)}
    num_blocks = dict.fromkeys(by_left, layout.num_blocks)
    return Budget("latency_s", kept["rest_seconds"], by_left, num_blocks)


def _measured(dense: Pruned, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `answer` returns, in the mean over the kinds of blocks that the model has."""
    # a block with a sliding window takes another time
    kinds = Counter(getattr(dense.layout.config, "layer_types", None) or [None])
    shares = [count / kinds.total() for count in kinds.values()]
    cluster = dense.cluster
    first = cluster.placement.workers[0]
    measured = []
    for kind in kinds:
        of_kind = {**request, "layer_type": kind}
        measured += cluster.get([cluster.submit(first, run_on_worker, __name__, of_kind)])
    times = zip(*([*m["seconds"], m["rest_seconds"]] for m in measured), strict=True)
    *seconds, rest = (sum(map(mul, shares, of_kinds)) for of_kinds in times)
    return {"device": measured[0]["device"], "seconds": seconds, "rest_seconds": rest}


def _table(numbers: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    """Return the seconds with 0, 1, ... groups left.

    Values are linear between measured numbers, and never fall.
    """
    rising = np.maximum.accumulate(np.asarray(seconds))
    return tuple(float(value) for value in np.interp(range(numbers[-1] + 1), numbers, rising))


def _model(request: Mapping[str, Any], widths: Sequence[Any], folder: Path) -> PreTrainedModel:
    """Return a model with random weights that has one block of each width.

    All blocks are of the request's kind if the model has several.
    """
    document = dict(request["document"])
    config = AutoConfig.for_model(**document)
    document[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(widths)
    document.pop("layer_types", None)
    if request["layer_type"] is not None:
        document["layer_types"] = [request["layer_type"]] * len(widths)
    layout = ModelLayout(config, family_of(config), {}, ())
    blocks = [BlockWidths(*width) for width in widths]
    (folder / SHIPPED).write_text(shipped_source(config))
    return random_model(per_block_document(layout, document, blocks), folder)


def _moment(device: torch.device) -> Any:
    """Return the present moment of a device's work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    """Return the seconds between two moments of a device's work."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _time_blocks(model: PreTrainedModel, options: SpeedSection) -> list[float]:
    """Return the seconds of each block, and of all the rest: medians over the measured turns."""
    num_blocks = len(model.config.block_sizes)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    (blocks,) = (blocks for blocks in lists if len(blocks) == num_blocks)
    moments: dict[nn.Module, list[Any]] = {block: [] for block in blocks}

    def note(block: nn.Module, *_: object) -> None:
        moments[block].append(_moment(model.device))

    for block in blocks:
        block.register_forward_pre_hook(note)
        block.register_forward_hook(note)
    turns = []
    for _ in range(options.num_repeats + 1):
        for noted in moments.values():
            noted.clear()
        whole = sum(timed(model, options))
        in_blocks = [sum(map(_seconds, noted[::2], noted[1::2])) for noted in moments.values()]
        turns.append([*in_blocks, whole - sum(in_blocks)])
    return [statistics.median(times) for times in zip(*turns[1:], strict=True)]


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seconds of every width and of what is outside the blocks.

    See `fresh_process.run_module`.
    """
    options = SpeedSection(**request["request"])
    device = torch.device(request["device"])
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(0)
    widths = [tuple(width) for width in request["widths"]]
    whole = max(widths)
    others = [width for width in widths if width != whole]
    more = {whole: 0.0}  # than the whole block beside it
    of_whole = []
    rests = []
    for first in range(0, max(1, len(others)), _BLOCKS_AT_ONCE - 1):
        batch = [whole, *others[first : first + _BLOCKS_AT_ONCE - 1]]
        with tempfile.TemporaryDirectory() as folder:
            model = _model(request, batch, Path(folder)).to(device)
            seconds = _time_blocks(model, options)
        rests.append(seconds.pop())
        of_whole.append(seconds[0])
        more |= {width: s - seconds[0] for width, s in zip(batch, seconds, strict=True)}
    dense = statistics.median(of_whole)
    return {
        "device": device_name(device, options.num_threads),
        "seconds": [dense + more[width] for width in widths],
        "rest_seconds": statistics.median(rests),
    }
