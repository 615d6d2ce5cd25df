"""A Hugging Face folder: written by the workers, reloaded in a fresh process, compared."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoTokenizer, PretrainedConfig

from ray_surgeon.export.reload import agree
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.plan.room import available_bytes
from ray_surgeon.runtime import fresh_process
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.collectives import decode
from ray_surgeon.runtime.fresh_process import run_on_worker
from ray_surgeon.runtime.passes import logits
from ray_surgeon.runtime.weights import num_files, save_weights
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import goes_along, open_model

NUM_COMPARED_TOKENS = 64
SHIPPED = "modeling_pruned.py"
"""The file of code beside weights whose blocks differ."""
_WRITTEN = ("*.index.json", "model*.safetensors", "masks*.safetensors")
"""Names of the files of weights and masks."""


@dataclass(frozen=True)
class Pruned:
    """A model that the workers have, pruned or to be pruned."""

    cluster: Cluster
    layout: ModelLayout  # of the dense model
    model: ModelSection  # the dense model, whose tokenizer and configuration go along
    facts: Mapping[str, Any]  # see `RunReport.model_card_facts`
    # [num_sequences, T] tokens, by which four bits are rounded; exports are compared on the first
    calibration: NDArray[np.int64]
    texts: Mapping[str, NDArray[np.int64]]  # name -> [num_windows, T] tokens to evaluate on


def write_weights(cluster: Cluster, uri: str, kind: str = "", left_out: Sequence[str] = ()) -> int:
    """Have every shard write its files, and an index if there are several, in the place of others.

    Returns the bytes of all weights.

    Args:
        cluster: with the pruned weights.
        uri: folder.
        kind: of an export. In one that is masked the shapes stay those of the dense model, with the
            masks in files beside; one that is per_block has the names that tensors have here.
        left_out: see `save_weights`.
    """
    # of a try that was interrupted, perhaps with another number of files
    files.remove_files(uri, _WRITTEN)
    numbers = cluster.run_all(num_files, kind == "masked")
    of_weights = _names("model", [n for n, _ in numbers])
    of_masks = _names("masks", [n for _, n in numbers])
    workers = zip(cluster.placement.workers, of_weights, of_masks, strict=True)
    futures = [
        cluster.submit(index, save_weights, uri, names, masks, left_out, kind != "per_block")
        for index, names, masks in workers
    ]
    written = [file for of_worker in cluster.get(futures) for file in of_worker]
    by_name = {file.uri.rpartition("/")[2]: file for file in written}
    weights = {name: file for name, file in by_name.items() if name.startswith("model")}
    total = sum(file.size_bytes for file in weights.values())
    write_index(uri, {key: name for name, file in weights.items() for key in file.keys}, total)
    return total


def write_index(uri: str, file_of: Mapping[str, str], num_bytes: int) -> None:
    """Write the index of a folder's tensors, given the file of each, if there are several files."""
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
        files.write_json(files.join(uri, "model.safetensors.index.json"), index)


def _names(stem: str, numbers: Sequence[int]) -> list[list[str]]:
    """Return the names of the files of every worker, numbered if there are several."""
    count = sum(numbers)
    places = [f"-{i:05d}-of-{count:05d}" if count > 1 else "" for i in range(1, count + 1)]
    names = iter([f"{stem}{place}.safetensors" for place in places])
    return [list(itertools.islice(names, number)) for number in numbers]


def dense_document(model: ModelSection) -> dict[str, Any]:
    """Return the dense model's config.json, with the dtype of the job.

    It is not quantised and names no code.

    Every family here has classes in transformers, and files of code are not copied.
    """
    config = open_model(model).fetch("config.json")
    document: dict[str, Any] = files.read_json(str(config))
    for name in ("torch_dtype", "quantization_config", "auto_map"):
        document.pop(name, None)
    # blocks that guess further tokens are no part of the model that transformers runs, and not read
    if document.get("num_nextn_predict_layers"):
        document["num_nextn_predict_layers"] = 0
    return document | {"dtype": model.dtype}


def copy_small_files(model: ModelSection, uri: str, *, another_type: bool = False) -> None:
    """Copy the tokenizer and the generation configuration of the dense model.

    transformers chooses a tokenizer's class by the type of the model, and some classes build
    another one than the file says. So if the export is of another type than the dense model, the
    tokenizer is written as it is for the dense one.
    """
    dense = open_model(model)
    for name in filter(goes_along, dense.names):
        if name != "config.json":
            files.put_file(files.join(uri, name), dense.fetch(name))
    if not another_type:
        return
    with tempfile.TemporaryDirectory() as scratch:
        AutoTokenizer.from_pretrained(dense.small_files_folder()).save_pretrained(scratch)
        settings = f"{scratch}/tokenizer_config.json"
        document = files.read_json(settings) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        files.write_json(settings, document)
        for path in Path(scratch).iterdir():
            files.put_file(files.join(uri, path.name), path)


def shipped_source(config: PretrainedConfig) -> str:
    """Return the source of `SHIPPED` for the family of the dense model."""
    text = (Path(__file__).parent / "shipped" / SHIPPED).read_text(encoding="utf-8")
    return text.replace('DENSE = "llama"', f'DENSE = "{config.model_type}"')


@contextlib.contextmanager
def local_folder(uri: str, *, weights: bool = True) -> Iterator[tuple[Path, Path]]:
    """Yield an export's folder on this machine, and a scratch folder.

    A folder elsewhere is copied, as is one without its weights; the copy is gone afterwards.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if weights and files.is_local(uri):
            yield Path(files.open_filesystem(uri)[1]), scratch
            return
        folder = scratch / "model"
        folder.mkdir()
        for name in files.list_files(uri):
            if weights or not name.endswith((".safetensors", ".gguf")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                files.download(files.join(uri, name), folder / name)
        yield folder, scratch


def run_beside(
    cluster: Cluster, module: str, request: Mapping[str, Any], offline: bool = True
) -> dict[str, Any]:
    """Run a module in a process beside the first worker; see `run_on_worker`."""
    first = cluster.placement.workers[0]
    return cluster.get([cluster.submit(first, run_on_worker, module, request, offline)])[0]


def run_for(uri: str, name: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a module of this folder in a process of its own, whose errors begin with the export."""
    try:
        return fresh_process.run_module(f"{__package__}.{name}", request)
    except RuntimeError as error:
        raise RuntimeError(f"the export {uri} cannot be written or loaded:\n{error}") from error


def run_reload(uri: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Load an export in a process of its own; `request` is the rest of what `reload` takes."""
    with local_folder(uri) as (folder, scratch):
        places = {"folder": str(folder), "offload": str(scratch)}
        request = {**places, "max_memory": available_bytes() // 2, **request}
        return run_for(uri, "reload", request)


def reload_difference(pruned: Pruned, uri: str) -> float:
    """Return the largest difference between the workers' logits and the export's.

    The export runs in a process of its own, which also generates.

    Args:
        pruned: the model.
        uri: the export.

    Raises:
        RuntimeError: the fresh process fails; or the logits differ by more than `agree` allows.
    """
    dtype = pruned.model.dtype
    half = pruned.layout.is_mixture and dtype != "float32"
    some = pruned.calibration[0, :NUM_COMPARED_TOKENS].tolist()
    workers_logits = decode(logits(pruned.cluster, some), torch.device("cpu"))
    with tempfile.NamedTemporaryFile() as file:
        request = {"tokens": some, "logits": file.name, "dtype": dtype, "half": half}
        run_reload(uri, request)
        reloaded_logits = load_file(file.name)["logits"]
    largest = float((workers_logits - reloaded_logits).abs().max())
    if not agree(reloaded_logits, workers_logits, dtype, half=half):
        raise RuntimeError(
            f"the export {uri} loads, but its logits differ from the workers' by {largest:g}; do "
            "not use it"
        )
    return largest
