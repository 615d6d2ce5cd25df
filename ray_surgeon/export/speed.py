"""Measures the speed of an export and of the dense model.

Both run in fresh processes with random weights: speed depends on shapes and dtype, not on values.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ray_surgeon.config.schedule import SpeedSection
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.processes import process_usage
from ray_surgeon.export import folder as folders
from ray_surgeon.memory.transfers import backend
from ray_surgeon.models.build import cache_argument

Speeds = dict[str, Any]
"""A JSON document."""


def measure(cluster: Cluster, uri: str, dense: Speeds, options: SpeedSection) -> Speeds:
    """Measure an export and the dense model in fresh processes beside the first worker.

    Args:
        cluster: its first worker measures, on its GPU if it has one.
        uri: the export.
        dense: config.json of the dense model.
        options: sizes of the timed requests.

    Returns:
        For ``dense`` and ``pruned``: tokens per second of prefill and decode (median, lowest,
        highest), peak bytes of a process that holds this model alone, and on a GPU of its memory;
        the ratios of the medians, and the machine.

    Raises:
        RuntimeError: a process fails.
    """
    request = {"uri": uri, "dense": dense, "request": options.model_dump()}
    record = folders.run_beside(cluster, __name__, {**request, "only": None})
    for name in ("dense", "pruned"):
        memory = folders.run_beside(cluster, __name__, {**request, "only": name})
        record[name].update(memory)
    return record


def _device_name(device: torch.device, num_threads: int) -> str:
    """Return the name of a device in reports."""
    if device.type == "cpu":
        return f"CPU, {num_threads} threads"
    return str(backend(device).get_device_name(device))


def _now(device: torch.device) -> float:
    """Wait until a device has done all its work; return the time in seconds."""
    if device.type != "cpu":
        backend(device).synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def time_request(model: PreTrainedModel, options: SpeedSection) -> tuple[float, float]:
    """Return the seconds of one prefill and of the decode that follows it, for random tokens."""
    cache = cache_argument(model)
    size = (options.batch_size, options.prompt_length)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, size, generator=generator)
    prompts = prompts.to(model.device)
    start = _now(model.device)
    out = model(prompts, use_cache=True, logits_to_keep=1)
    middle = _now(model.device)
    for _ in range(options.num_new_tokens):
        tokens = out.logits[:, -1:].argmax(dim=-1)
        out = model(tokens, **{cache: out[cache]}, use_cache=True)
    return middle - start, _now(model.device) - middle


def _compare(models: Mapping[str, PreTrainedModel], options: SpeedSection) -> Speeds:
    """Time the models in alternation, after one untimed run of each.

    Returns:
        The timings and ratios that `measure` returns.
    """
    prefills = defaultdict[str, list[float]](list)
    decodes = defaultdict[str, list[float]](list)
    for turn in range(options.num_repeats + 1):
        for name, model in models.items():
            prefill_s, decode_s = time_request(model, options)
            if turn > 0:
                prefills[name].append(prefill_s)
                decodes[name].append(decode_s)
    record: Speeds = {name: {} for name in models}
    steps = (
        ("prefill", options.prompt_length, prefills),
        ("decode", options.num_new_tokens, decodes),
    )
    for step, num_tokens, timings in steps:
        medians = {}
        for name in models:
            total = options.batch_size * num_tokens
            rates = [total / seconds for seconds in timings[name]]
            medians[name] = statistics.median(rates)
            record[name][f"{step}_tokens_per_s"] = {
                "median": medians[name],
                "lowest": min(rates),
                "highest": max(rates),
            }
        record[f"{step}_ratio"] = medians["pruned"] / medians["dense"]
    return record


def _random_model(document: Speeds, folder: Path) -> PreTrainedModel:
    """Return a model with random weights.

    Args:
        document: content of config.json.
        folder: folder for config.json; modeling code in it is ours.
    """
    (folder / "config.json").write_text(json.dumps(document))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    dtype = getattr(torch, document["dtype"])
    # classes whose blocks differ in width build the dense model first, and narrow it
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=True
        )
    for name, absent in list(model.named_parameters()):
        values = torch.empty_like(absent, device="cpu").normal_(std=0.02)
        set_module_tensor_to_device(model, name, "cpu", values)
    model.tie_weights()
    return model.eval()


def answer(request: Speeds) -> Speeds:
    """Compare two models, or measure the memory that one of them takes alone.

    See `processes.run_module`.

    Returns:
        The timings, ratios and machine that `measure` returns; or with ``only`` the peak bytes of
        this process, and of the GPU.
    """
    options = SpeedSection(**request["request"])
    torch.set_num_threads(options.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    only = request["only"]
    with folders.local_folder(request["uri"], weights=False) as (folder, scratch):
        document = json.loads((folder / "config.json").read_text())
        models = {}
        if only in (None, "dense"):
            models["dense"] = _random_model(request["dense"], scratch).to(device)
        if only in (None, "pruned"):
            models["pruned"] = _random_model(document, folder).to(device)
        if only is None:
            return {
                **_compare(models, options),
                "device": _device_name(device, options.num_threads),
                "dtype": document["dtype"],
                **options.model_dump(),
            }
        time_request(models[only], options)
    usage = process_usage(device)
    return {
        "peak_rss_bytes": usage.peak_rss_bytes,
        "peak_gpu_bytes": usage.peak_gpu_bytes,
    }
