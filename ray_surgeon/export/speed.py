"""How fast an export is beside the dense model.

Each is measured in a process of its own, with random weights: speed depends on shapes and dtype,
not on values.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ray_surgeon.export import folder as folders
from ray_surgeon.memory.transfers import backend
from ray_surgeon.models.build import cache_argument
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.usage import process_usage
from ray_surgeon.spec.targets import SpeedSection

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


def _now(device: torch.device) -> float:
    """Return the time when a device has done all its work."""
    if device.type != "cpu":
        backend(device).synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def time_request(model: PreTrainedModel, options: SpeedSection) -> tuple[float, float]:
    """Return the seconds of one prefill and of the decode that follows it, for random tokens."""
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


def _compare(models: Mapping[str, PreTrainedModel], options: SpeedSection) -> Record:
    """Time models in turns, after one unmeasured turn each. See `measure` for what is returned."""
    turns = range(options.num_repeats + 1)
    timings = [
        {name: time_request(model, options) for name, model in models.items()} for _ in turns
    ]
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


def answer(request: Record) -> Record:
    """Return the comparison, or what one model alone needs of memory.

    See `fresh_process.run_module`.
    """
    options = SpeedSection(**request["request"])
    torch.set_num_threads(options.num_threads)
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
        time_request(models[request["only"]], options)
    usage = process_usage(device)
    return {"peak_rss_bytes": usage.peak_rss_bytes, "peak_gpu_bytes": usage.peak_gpu_bytes}
