"""How long a block of a given width takes, measured once a width.

The first worker's machine measures; the run directory keeps the result.
"""

from __future__ import annotations

import json
import operator
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ray_surgeon.export.folder import dense_document
from ray_surgeon.export.kinds import shipped_source
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.build import cache_argument
from ray_surgeon.models.families import family_of
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, kv_heads_left, per_block_document
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.fresh_process import run_on_worker
from ray_surgeon.spec.model import ModelSection
from ray_surgeon.spec.targets import LatencyTarget, SpeedSection
from ray_surgeon.storage import files

_BLOCKS_AT_ONCE = 8
"""Of one timed model, so that it fits where the whole model might not."""


@dataclass(frozen=True)
class Widths:
    """Which widths are measured."""

    # kind of groups -> groups that must be left in every block; other kinds stay whole
    fewest: Mapping[str, int]
    multiple: int  # feed-forward widths are multiples of this
    tensor_parallel: int  # see `kv_heads_left`
    uniform: bool  # whether plain classes must hold the numbers of heads


def latency_budget(
    cluster: Cluster,
    layout: ModelLayout,
    model: ModelSection,
    target: LatencyTarget,
    wanted: Widths,
    uri: str,
) -> Budget:
    """Return the latency of a model as a sum over its blocks.

    Args:
        cluster: its first worker measures.
        layout: of the dense model.
        model: the dense model.
        target: what is measured.
        wanted: of which widths.
        uri: a JSON file; what it holds already, measured with the same options, is not measured
            again.

    Raises:
        RuntimeError: the measuring process fails.
    """
    channels, heads = _numbers(layout, wanted)
    widths = [(number, heads[-1]) for number in channels] + [
        (channels[-1], number) for number in heads[:-1]
    ]
    about = (
        target.model_dump(mode="json", exclude={"latency_s"})
        | {"dtype": model.dtype}
        | asdict(wanted)
    )
    kept: dict[str, Any] = files.read_json(uri) if files.exists(uri) else {}
    if kept.get("options") != about or kept.get("widths") != [list(width) for width in widths]:
        document = dense_document(model)
        first = cluster.placement.workers[0]
        # a block with a sliding window takes another time
        kinds = Counter(getattr(layout.config, "layer_types", None) or [None])
        requests = [
            about | {"document": document, "widths": widths, "layer_type": kind} for kind in kinds
        ]
        measured = [
            cluster.get(
                [cluster.submit(first, run_on_worker, "ray_surgeon.export.latency", request)]
            )[0]
            for request in requests
        ]
        shares = [count / kinds.total() for count in kinds.values()]
        kept = {
            "options": about,
            "widths": [list(width) for width in widths],
            "device": measured[0]["device"],
        }
        kept["seconds"] = [
            sum(map(operator.mul, shares, times))
            for times in zip(*(m["seconds"] for m in measured), strict=True)
        ]
        kept["rest_seconds"] = sum(map(operator.mul, shares, (m["rest_seconds"] for m in measured)))
        files.write_json(uri, kept)
    seconds = dict(zip(widths, kept["seconds"], strict=True))
    whole = (channels[-1], heads[-1])
    ffn = _table(channels, [seconds[n, heads[-1]] for n in channels])
    attention = _table(heads, [seconds[channels[-1], n] - seconds[whole] for n in heads])
    assert (len(ffn) - 1, len(attention) - 1) == (channels[-1], layout.heads.num_kv)
    return Budget(
        "latency_s",
        kept["rest_seconds"],
        {"ffn": ffn, "attention": attention},
        dict.fromkeys(("ffn", "attention"), layout.num_blocks),
    )


def _numbers(layout: ModelLayout, wanted: Widths) -> tuple[list[int], list[int]]:
    """Return the numbers of channels and of KV heads that may be left, in ascending order."""
    num_heads = layout.heads.num_kv
    all_channels = layout.num_channels
    heads = [num_heads]
    channels = [all_channels]
    if "ffn" in wanted.fewest:
        least = wanted.fewest["ffn"]
        channels = sorted(
            {*(n for n in range(0, all_channels, wanted.multiple) if n >= least), all_channels}
        )
    if "attention" in wanted.fewest:
        allowed = kv_heads_left(layout, wanted.tensor_parallel, uniform=wanted.uniform)
        heads = sorted({*(k for k in allowed if k >= wanted.fewest["attention"]), num_heads})
    return channels, heads


def _table(numbers: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    """Return the seconds with 0, 1, ... groups left.

    Values are linear between measured numbers, and never fall.
    """
    rising = np.maximum.accumulate(np.asarray(seconds))
    return tuple(float(value) for value in np.interp(range(numbers[-1] + 1), numbers, rising))


def _model(
    document: Mapping[str, Any],
    widths: Sequence[tuple[int, int]],
    layer_type: str | None,
    folder: Path,
) -> Any:
    """Return a model with random weights that has one block of each width.

    All blocks are of one kind if the model has several.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(document))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    layers = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    fewer = {name: value for name, value in document.items() if name != "layer_types"} | {
        layers: len(widths)
    }
    fewer |= {"layer_types": [layer_type] * len(widths)} if layer_type is not None else {}
    blocks = [BlockWidths(channels, heads) for channels, heads in widths]
    (folder / "config.json").write_text(
        json.dumps(
            per_block_document(
                ModelLayout(config, family_of(config), {}, ()), fewer, blocks, "modeling_pruned"
            )
        )
    )
    (folder / "modeling_pruned.py").write_text(shipped_source("modeling_pruned.py", config))
    # the code is ours, written just now
    pruned = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(
        pruned, dtype=getattr(torch, str(document["dtype"])), trust_remote_code=True
    )


class _Clock:
    """Seconds between two moments of a device's work."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        if not self._on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


@torch.no_grad()
def _time_blocks(model: Any, options: SpeedSection, device: torch.device) -> list[list[float]]:
    """Return for every measured turn the seconds of each block, and of all the rest."""
    clock = _Clock(device)
    num_blocks = len(model.config.block_sizes)
    (blocks,) = (
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_blocks
    )
    moments: list[list[Any]] = [[] for _ in blocks]

    def note(place: int) -> Callable[..., None]:
        return lambda *_: moments[place].append(clock.now())

    for place, block in enumerate(blocks):
        block.register_forward_pre_hook(note(place))
        block.register_forward_hook(note(place))
    prompts = torch.randint(
        model.config.vocab_size, (options.batch_size, options.prompt_length)
    ).to(device)
    turns = []
    cache = cache_argument(model)
    for _ in range(options.num_repeats + 1):
        for noted in moments:
            noted.clear()
        start = clock.now()
        out = model(prompts, use_cache=True, logits_to_keep=1)
        for _ in range(options.num_new_tokens):
            out = model(out.logits[:, -1:].argmax(dim=-1), **{cache: out[cache]}, use_cache=True)
        whole = clock.between(start, clock.now())
        in_blocks = [
            sum(clock.between(*pair) for pair in zip(noted[::2], noted[1::2], strict=True))
            for noted in moments
        ]
        turns.append([*in_blocks, whole - sum(in_blocks)])
    return turns[1:]


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
    seconds: dict[tuple[int, int], float] = {}
    of_whole = []
    rests = []
    others = [width for width in widths if width != whole]
    with tempfile.TemporaryDirectory() as scratch:
        for first in range(0, max(1, len(others)), _BLOCKS_AT_ONCE - 1):
            batch = [whole, *others[first : first + _BLOCKS_AT_ONCE - 1]]
            model = (
                _model(
                    request["document"], batch, request["layer_type"], Path(scratch) / str(first)
                )
                .eval()
                .to(device)
            )
            medians = [
                statistics.median(times)
                for times in zip(*_time_blocks(model, options, device), strict=True)
            ]
            # beside the same whole block
            seconds |= {
                width: value - medians[0] for width, value in zip(batch, medians[:-1], strict=True)
            }
            of_whole.append(medians[0])
            rests.append(medians[-1])
    dense = statistics.median(of_whole)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {options.num_threads} threads"
    )
    return {
        "device": name,
        "seconds": [dense + seconds[width] for width in widths],
        "rest_seconds": statistics.median(rests),
    }
