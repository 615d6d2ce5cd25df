"""How fast a smaller model is beside the dense one: in one fresh process, measured in turns.

The dense model is built from its configuration with random weights: its speed depends on shapes and dtype, not on values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ray_surgeon.export.folder import download_folder, run_alone


@dataclass(frozen=True)
class SpeedOptions:
    """See `sections.SpeedSection`."""

    batch_size: int
    prompt_length: int
    num_new_tokens: int
    num_repeats: int
    num_threads: int


def measure(uri: str, dense: Path, scratch: Path, options: SpeedOptions, *, shipped_code: bool) -> dict[str, Any]:
    """Measure an export beside the dense model in a fresh process.

    Args:
        uri: the export.
        dense: config.json of the dense model.
        scratch: an empty folder but for that file.
        options: what to time.
        shipped_code: whether modeling code lies beside the weights.

    Returns:
        For ``dense`` and ``pruned``: tokens per second of prefill and decode (median, lowest, highest), bytes of the weights, and peak
        bytes on a GPU; the ratios of the medians, and the machine.

    Raises:
        RuntimeError: the process fails.
    """
    download_folder(uri, scratch / "model")
    settings = [str(value) for value in asdict(options).values()]
    flags = ["--shipped-code"] if shipped_code else []
    out = run_alone("ray_surgeon.export.speed", [str(dense), str(scratch / "model"), *settings, *flags], scratch, uri)
    found = json.loads(out.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def _once(model: PreTrainedModel, prompts: torch.Tensor, options: SpeedOptions) -> tuple[float, float]:
    """Return tokens per second of one prefill and of the decode that follows it."""
    state: dict[str, Any] = {}

    def prefill() -> None:
        state["out"] = model(prompts, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        out = state["out"]
        for _ in range(options.num_new_tokens):
            token = out.logits[:, -1:].argmax(dim=-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

    read = prompts.numel() / _timed(prefill, prompts.device)
    return read, options.num_new_tokens * len(prompts) / _timed(decode, prompts.device)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def compare(models: dict[str, PreTrainedModel], prompts: torch.Tensor, options: SpeedOptions) -> dict[str, Any]:
    """Time models in turns, after one unmeasured turn each. See `measure` for what is returned."""
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks: dict[str, int] = {}
    for turn in range(options.num_repeats + 1):
        for name, model in models.items():
            if prompts.is_cuda:
                torch.cuda.reset_peak_memory_stats(prompts.device)
            timing = _once(model, prompts, options)
            if turn:
                timings[name].append(timing)
            peaks[name] = torch.cuda.max_memory_allocated(prompts.device) if prompts.is_cuda else 0
    record: dict[str, Any] = {
        name: {
            "prefill_tokens_per_s": _spread([read for read, _ in timings[name]]),
            "decode_tokens_per_s": _spread([written for _, written in timings[name]]),
            "weights_bytes": sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values()),
            "peak_gpu_bytes": peaks[name],
        }
        for name, model in models.items()
    }
    for step in ("prefill", "decode"):
        medians = [record[name][f"{step}_tokens_per_s"]["median"] for name in ("dense", "pruned")]
        record[f"{step}_ratio"] = medians[1] / medians[0]
    return record


def main(argv: list[str] | None = None) -> None:
    """Print the comparison as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dense", help="config.json of the dense model")
    parser.add_argument("folder")
    for name in SpeedOptions.__dataclass_fields__:
        parser.add_argument(name, type=int)
    parser.add_argument("--shipped-code", action="store_true")
    arguments = parser.parse_args(argv)
    options = SpeedOptions(**{name: getattr(arguments, name) for name in SpeedOptions.__dataclass_fields__})
    torch.set_num_threads(options.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pruned = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype="auto", trust_remote_code=arguments.shipped_code)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(Path(arguments.dense).read_text())
        config = AutoConfig.from_pretrained(folder)
    models = {"dense": AutoModelForCausalLM.from_config(config, dtype=pruned.dtype), "pruned": pruned}
    models = {name: model.eval().to(device) for name, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (options.batch_size, options.prompt_length), generator=generator).to(device)
    record = compare(models, prompts, options)
    about = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.num_threads} threads"}
    sys.stdout.write(json.dumps(record | about | {"dtype": str(pruned.dtype).removeprefix("torch.")} | asdict(options)) + "\n")


if __name__ == "__main__":
    main()
