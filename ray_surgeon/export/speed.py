"""How fast models are: an export beside the dense model, and blocks of every width (`latency`).

Each is measured in a process of its own, with random weights: speed depends on shapes and dtype,
not on values.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ray_surgeon.export import folder as folders
from ray_surgeon.memory.transfers import backend
from ray_surgeon.models.build import cache_argument
from ray_surgeon.models.families import family_of
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, per_block_document
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.usage import process_usage
from ray_surgeon.spec.targets import SpeedSection

_BLOCKS_AT_ONCE = 8
"""Of one timed model, so that it fits where the whole model might not."""

Record = dict[str, Any]
"""Something that travels as JSON."""


def measure(cluster: Cluster, uri: str, dense: Record, options: SpeedSection) -> Record:
    """Measure an export beside the dense model, in fresh processes beside the first worker.

    Args:
        cluster: its first worker measures, on its GPU if it has one.
        uri: the export.
        dense: config.json of the dense model.
        options: what to time.

    Returns:
        For ``dense`` and ``pruned``: tokens per second of prefill and decode (median, lowest,
        highest), peak bytes of a process that holds this model alone, and on a GPU of its memory;
        the ratios of the medians, and the machine.

    Raises:
        RuntimeError: a process fails.
    """
    request = {"uri": uri, "dense": dense, "request": options.model_dump()}
    record = folders.run_beside(cluster, __name__, request | {"only": None})
    for name in ("dense", "pruned"):
        record[name] |= folders.run_beside(cluster, __name__, request | {"only": name})
    return record


def _device_name(device: torch.device, num_threads: int) -> str:
    """Return what a report calls a device."""
    if device.type == "cpu":
        return f"CPU, {num_threads} threads"
    return str(backend(device).get_device_name(device))


def _moment(device: torch.device) -> Any:
    """Return the present moment of a device's work, without waiting for it."""
    if device.type == "cpu":
        return time.perf_counter()
    event = backend(device).Event(enable_timing=True)
    event.record()
    return event


def _now(device: torch.device) -> float:
    """Return the time when a device has done all its work."""
    if device.type != "cpu":
        backend(device).synchronize(device)
    return time.perf_counter()


def _seconds(start: Any, end: Any) -> float:
    """Return the seconds between two moments of a device's work."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@torch.no_grad()
def _timed(model: PreTrainedModel, options: SpeedSection) -> tuple[float, float]:
    """Return the seconds of one prefill and of the decode that follows it."""
    cache = cache_argument(model)
    size = (options.batch_size, options.prompt_length)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, size, generator=generator).to(model.device)
    start = _now(model.device)
    out = model(prompts, use_cache=True, logits_to_keep=1)
    middle = _now(model.device)
    for _ in range(options.num_new_tokens):
        out = model(out.logits[:, -1:].argmax(dim=-1), **{cache: out[cache]}, use_cache=True)
    return middle - start, _now(model.device) - middle


def _time_blocks(model: PreTrainedModel, options: SpeedSection) -> NDArray[np.float64]:
    """Return the seconds [blocks + 1, 2] of each block, and of all the rest.

    They are of the prompts and of the new tokens, and medians over the measured turns.
    """
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
        whole = _timed(model, options)
        passes = [list(map(_seconds, noted[::2], noted[1::2])) for noted in moments.values()]
        in_blocks = np.array([[seconds[0], sum(seconds[1:])] for seconds in passes])
        turns.append([*in_blocks, whole - in_blocks.sum(0)])
    medians: NDArray[np.float64] = np.median(turns[1:], axis=0)
    return medians


def _compare(models: Mapping[str, PreTrainedModel], options: SpeedSection) -> Record:
    """Time models in turns, after one unmeasured turn each. See `measure` for what is returned."""
    turns = range(options.num_repeats + 1)
    timings = [{name: _timed(model, options) for name, model in models.items()} for _ in turns]
    record: Record = {name: {} for name in models}
    for i, step in enumerate(("prefill", "decode")):
        each = options.num_new_tokens if i else options.prompt_length
        medians = {}
        for name in models:
            rates = [options.batch_size * each / timing[name][i] for timing in timings[1:]]
            medians[name] = statistics.median(rates)
            spread = {"median": medians[name], "lowest": min(rates), "highest": max(rates)}
            record[name][f"{step}_tokens_per_s"] = spread
        record[f"{step}_ratio"] = medians["pruned"] / medians["dense"]
    return record


def _random_model(document: Record, folder: Path) -> PreTrainedModel:
    """Return a model with random weights.

    Args:
        document: its config.json, which is written.
        folder: for it; modeling code, if any, lies there and is ours.
    """
    (folder / "config.json").write_text(json.dumps(document))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    options = {"dtype": getattr(torch, document["dtype"]), "trust_remote_code": True}
    # classes whose blocks differ build the dense model, and make it narrow
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    for name, absent in list(model.named_parameters()):
        values = torch.empty_like(absent, device="cpu").normal_(std=0.02)
        set_module_tensor_to_device(model, name, "cpu", values)
    model.tie_weights()
    return model.eval()


def _model_of_blocks(request: Record, widths: Sequence[Any], folder: Path) -> PreTrainedModel:
    """Return a model with random weights that has one block of each width.

    All blocks are of the request's kind if the model has several.
    """
    document = dict(request["document"])
    config = AutoConfig.for_model(**document)
    document[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(widths)
    if request["layer_type"] is not None:
        document["layer_types"] = [request["layer_type"]] * len(widths)
    layout = ModelLayout(config, family_of(config), {}, ())
    blocks = [BlockWidths(*width) for width in widths]
    (folder / folders.SHIPPED).write_text(folders.shipped_source(config))
    return _random_model(per_block_document(layout, document, blocks), folder)


def _of_widths(request: Record, options: SpeedSection) -> Record:
    """Return the seconds of every width and of what is outside blocks; see `_time_blocks`."""
    device = torch.device(request["device"])
    name = _device_name(device, options.num_threads)
    torch.manual_seed(0)
    widths = [tuple(width) for width in request["widths"]]
    whole = max(widths)
    others = [width for width in widths if width != whole]
    more = {whole: np.zeros(2)}  # than the whole block beside it
    of_whole = []
    rests = []
    for first in range(0, max(1, len(others)), _BLOCKS_AT_ONCE - 1):
        batch = [whole, *others[first : first + _BLOCKS_AT_ONCE - 1]]
        with tempfile.TemporaryDirectory() as folder:
            model = _model_of_blocks(request, batch, Path(folder)).to(device)
            *seconds, rest = _time_blocks(model, options)
        rests.append(rest)
        of_whole.append(seconds[0])
        more |= {width: s - seconds[0] for width, s in zip(batch, seconds, strict=True)}
    dense = np.median(of_whole, axis=0)
    seconds = [(dense + more[width]).tolist() for width in widths]
    return {"device": name, "seconds": seconds, "rest": np.median(rests, axis=0).tolist()}


def answer(request: Record) -> Record:
    """Return seconds of widths, the comparison, or what one model alone needs of memory.

    See `fresh_process.run_module`.
    """
    options = SpeedSection(**request["request"])
    torch.set_num_threads(options.num_threads)
    if "widths" in request:
        return _of_widths(request, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with folders.local_folder(request["uri"], weights=False) as (folder, scratch):
        document = json.loads((folder / "config.json").read_text())
        places = {"dense": (request["dense"], scratch), "pruned": (document, folder)}
        names = [request["only"]] if request["only"] else list(places)
        models = {name: _random_model(*places[name]).to(device) for name in names}
        if request["only"] is None:
            name = _device_name(device, options.num_threads)
            about = {"device": name, "dtype": document["dtype"]}
            return _compare(models, options) | about | options.model_dump()
        _timed(models[request["only"]], options)
    usage = process_usage(device)
    return {"peak_rss_bytes": usage.peak_rss_bytes, "peak_gpu_bytes": usage.peak_gpu_bytes}
