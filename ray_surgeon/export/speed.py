"""How fast a smaller model is beside the dense one: in one process of its own, measured in turns.

The dense model is built from its configuration with random weights: its speed depends on shapes and
dtype, not on values.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ray_surgeon.export.folder import download_folder, local_folder
from ray_surgeon.models.build import cache_argument
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.fresh_process import run_on_worker
from ray_surgeon.runtime.placement import WorkerIndex
from ray_surgeon.runtime.usage import process_usage
from ray_surgeon.spec.targets import SpeedSection


def measure(
    cluster: Cluster,
    uri: str,
    dense: Mapping[str, Any],
    options: SpeedSection,
    *,
    shipped_code: bool,
) -> dict[str, Any]:
    """Measure an export beside the dense model, in fresh processes.

    They run beside the first worker and the last, on their GPUs if they have some.

    Args:
        cluster: its first worker times, and the last one finds out what the export needs of memory.
        uri: the export.
        dense: config.json of the dense model.
        options: what to time.
        shipped_code: whether modeling code lies beside the weights.

    Returns:
        For ``dense`` and ``pruned``: tokens per second of prefill and decode (median, lowest,
        highest), bytes of the weights, peak bytes of a process that holds this model alone, and on
        a GPU of its memory; the ratios of the medians, and the machine.

    Raises:
        RuntimeError: a process fails.
    """
    request = {
        "uri": uri,
        "dense": dense,
        "options": options.model_dump(),
        "shipped_code": shipped_code,
    }

    first = cluster.placement.workers[0]
    last = cluster.placement.workers[-1]

    def run(on: WorkerIndex, only: str | None) -> Any:
        return cluster.submit(
            on, run_on_worker, "ray_surgeon.export.speed", request | {"only": only}
        )

    record: dict[str, Any] = cluster.get([run(first, None)])[0]
    # at the same time: what they need does not depend on how long it takes
    alone = cluster.get([run(first, "dense"), run(last, "pruned")])
    for name, usage in zip(("dense", "pruned"), alone, strict=True):
        record[name] |= usage
    return record


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def _once(
    model: PreTrainedModel, prompts: torch.Tensor, options: SpeedSection
) -> tuple[float, float]:
    """Return tokens per second of one prefill and of the decode that follows it."""
    state = dict[str, Any]()
    cache = cache_argument(model)

    def prefill() -> None:
        state["out"] = model(prompts, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        out = state["out"]
        for _ in range(options.num_new_tokens):
            token = out.logits[:, -1:].argmax(dim=-1)
            out = model(token, **{cache: out[cache]}, use_cache=True)

    read = prompts.numel() / _timed(prefill, prompts.device)
    return read, options.num_new_tokens * len(prompts) / _timed(decode, prompts.device)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def compare(
    models: dict[str, PreTrainedModel], prompts: torch.Tensor, options: SpeedSection
) -> dict[str, Any]:
    """Time models in turns, after one unmeasured turn each. See `measure` for what is returned."""
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(options.num_repeats + 1):
        for name, model in models.items():
            timing = _once(model, prompts, options)
            if turn:
                timings[name].append(timing)
    record: dict[str, Any] = {
        name: {
            "prefill_tokens_per_s": _spread([read for read, _ in timings[name]]),
            "decode_tokens_per_s": _spread([written for _, written in timings[name]]),
            "weights_bytes": sum(
                p.numel() * p.element_size()
                for p in {id(p): p for p in model.parameters()}.values()
            ),
        }
        for name, model in models.items()
    }
    for step in ("prefill", "decode"):
        medians = [record[name][f"{step}_tokens_per_s"]["median"] for name in ("dense", "pruned")]
        record[f"{step}_ratio"] = medians[1] / medians[0]
    return record


def _random_model(
    document: Mapping[str, Any], folder: Path, dtype: torch.dtype, *, shipped_code: bool
) -> PreTrainedModel:
    """Return a model of a configuration with random weights.

    Modeling code, if any, lies in the folder.
    """
    (folder / "config.json").write_text(json.dumps(document))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=shipped_code)
    # classes whose blocks differ build the dense model, and make it narrow
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=shipped_code
        )
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, absent in module.named_parameters(recurse=False):
            if id(absent) not in filled:
                values = torch.empty_like(absent, device="cpu").normal_(std=0.02)
                filled[id(absent)] = nn.Parameter(values, requires_grad=False)
            setattr(module, name, filled[id(absent)])
    model.tie_weights()
    return model


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the comparison, or what one model alone needs of memory.

    See `fresh_process.run_module`.
    """
    options = SpeedSection(**request["options"])
    shipped_code = bool(request["shipped_code"])
    torch.set_num_threads(options.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as held:
        dense_folder = Path(scratch) / "dense"
        folder = Path(scratch) / "model"
        dense_folder.mkdir()
        if request["only"] is None:
            folder, _ = held.enter_context(local_folder(request["uri"]))
        else:
            download_folder(request["uri"], folder, weights=False)
        document = json.loads((folder / "config.json").read_text())
        dtype = getattr(torch, document["dtype"])
        models: dict[str, PreTrainedModel] = {}
        if request["only"] in (None, "dense"):
            models["dense"] = _random_model(
                request["dense"], dense_folder, dtype, shipped_code=False
            )
        # random as well, because what loading takes is not what is asked
        if request["only"] == "pruned":
            models["pruned"] = _random_model(document, folder, dtype, shipped_code=shipped_code)
        if request["only"] is None:
            models["pruned"] = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", trust_remote_code=shipped_code
            )
        models = {name: model.eval().to(device) for name, model in models.items()}
        generator = torch.Generator().manual_seed(0)
        size = (options.batch_size, options.prompt_length)
        prompts = torch.randint(int(document["vocab_size"]), size, generator=generator).to(device)
        if request["only"] is None:
            about = {
                "device": torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else f"CPU, {options.num_threads} threads"
            }
            record = (
                compare(models, prompts, options)
                | about
                | {"dtype": document["dtype"]}
                | options.model_dump()
            )
        else:
            _once(models[request["only"]], prompts, options)
            usage = process_usage(device)
            record = {
                "peak_rss_bytes": usage.peak_rss_bytes,
                "peak_gpu_bytes": usage.peak_gpu_bytes,
            }
    return record
