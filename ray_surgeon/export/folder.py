"""A Hugging Face folder: written by the workers, reloaded in a fresh process, compared."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from ray_surgeon.export.reload import agree
from ray_surgeon.models.pruned_config import BlockWidths
from ray_surgeon.plan.room import available_bytes
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.fresh_process import run_module
from ray_surgeon.runtime.passes import logits
from ray_surgeon.runtime.saving import num_files, save_weights
from ray_surgeon.runtime.transport import decode
from ray_surgeon.spec.model import ModelSection
from ray_surgeon.spec.output import QuantizeSection
from ray_surgeon.storage import files, tensor_files
from ray_surgeon.storage.sources import goes_along, open_model

NUM_COMPARED_TOKENS = 64
WRITTEN = (
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "masks.safetensors",
    "masks-?????-of-?????.safetensors",
    "*.index.json",
)
"""Names of the files of weights and masks."""


def write_weights(
    cluster: Cluster,
    uri: str,
    *,
    cut_out: bool,
    masks: bool,
    left_out: tuple[str, ...] = (),
    stored: bool = True,
) -> int:
    """Have every shard write its files, and an index if there are several, in the place of others.

    Returns the bytes of all weights.

    Args:
        cluster: with the pruned weights.
        uri: folder.
        cut_out: see `save_weights`.
        masks: whether to write the masks too, beside the weights.
        left_out: see `save_weights`.
        stored: likewise.
    """
    # of a try that was interrupted, perhaps with another number of files
    files.remove_files(uri, WRITTEN)
    numbers = cluster.run_all(num_files, masks)
    of_weights = _names("model", [n for n, _ in numbers])
    of_masks = _names("masks", [n for _, n in numbers])
    futures = [
        cluster.submit(
            index,
            save_weights,
            uri,
            of_weights[i],
            of_masks[i],
            cut_out=cut_out,
            left_out=left_out,
            stored=stored,
        )
        for i, index in enumerate(cluster.placement.workers)
    ]
    written = [file for worker in cluster.get(futures) for file in worker]
    weights = [file for file in written if file.uri.rpartition("/")[2].startswith("model")]
    total = sum(file.size_bytes for file in weights)
    if len(weights) > 1:
        weight_map = {key: file.uri.rpartition("/")[2] for file in weights for key in file.keys}
        files.write_json(
            files.join(uri, "model.safetensors.index.json"),
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    return total


def _names(stem: str, numbers: Sequence[int]) -> list[list[str]]:
    """Return the names of the files of every worker, numbered if there are several."""
    count = sum(numbers)
    names = []
    first = 1
    for number in numbers:
        several = [
            f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(first, first + number)
        ]
        names.append(several if count > 1 else [f"{stem}.safetensors"] * number)
        first += number
    return names


def dense_document(model: ModelSection) -> dict[str, Any]:
    """Return the dense model's config.json, with the dtype of the job.

    It is not quantised and names no code.

    Every family here has classes in transformers, and files of code are not copied.
    """
    document = json.loads(open_model(model).fetch("config.json").read_text(encoding="utf-8"))
    for name in ("torch_dtype", "quantization_config", "auto_map"):
        document.pop(name, None)
    # blocks that guess further tokens are no part of the model that transformers runs, and not read
    without = {"num_nextn_predict_layers": 0} if document.get("num_nextn_predict_layers") else {}
    return dict(document) | {"dtype": model.dtype} | without


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
        if not (Path(scratch) / "tokenizer.json").exists():
            return
        said = Path(scratch) / "tokenizer_config.json"
        document = json.loads(said.read_text(encoding="utf-8")) | {
            "tokenizer_class": "PreTrainedTokenizerFast"
        }
        said.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
        for path in Path(scratch).iterdir():
            files.put_file(files.join(uri, path.name), path)


def write_gguf_files(
    cluster: Cluster,
    model: ModelSection,
    uri: str,
    document: Mapping[str, Any],
    widths: Sequence[BlockWidths],
    kinds: Sequence[str],
    left_out: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Write GGUF files from weights that the workers write beside them, and that are removed then.

    Args:
        cluster: with the pruned weights.
        model: the dense model, whose tokenizer goes along.
        uri: folder.
        document: content of the dense model's config.json.
        widths: of every block.
        kinds: types of the matrices, a file each.
        left_out: see `save_weights`.

    Returns:
        Name, size and largest error of every file; see `gguf_file.write_gguf`.

    Raises:
        RuntimeError: the files cannot be written.
    """
    weights = files.join(uri, "weights")
    files.remove_folder(uri)  # of a try that was interrupted
    name = model.source.rstrip("/").rpartition("/")[2].removesuffix(".gguf") + "-pruned"
    request = {
        "folder": weights,
        "document": document,
        "widths": [(width.num_channels, width.num_kv_heads) for width in widths],
        "kinds": kinds,
    }
    try:
        write_weights(cluster, weights, cut_out=True, masks=False, left_out=left_out)
        copy_small_files(model, weights)
        files.write_json(files.join(weights, "config.json"), dict(document))
        reply = run_module("ray_surgeon.export.gguf_file", request | {"name": name, "target": uri})
    except RuntimeError as error:
        raise RuntimeError(f"the export {uri} cannot be written:\n{error}") from error
    finally:
        files.remove_folder(weights)
    written: list[dict[str, Any]] = reply["files"]
    return written


def download_folder(uri: str, folder: Path, *, weights: bool = True) -> None:
    """Copy the files of an export into a local folder, with or without its weights."""
    folder.mkdir()
    for name in files.list_files(uri):
        if weights or not name.endswith(".safetensors"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.download(files.join(uri, name), folder / name)


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[tuple[Path, Path]]:
    """Yield an export's folder on this machine, and a scratch folder.

    An export elsewhere is copied; the copy is gone afterwards.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = Path(files.open_filesystem(uri)[1]) if files.is_local(uri) else scratch / "model"
        if not files.is_local(uri):
            download_folder(uri, folder)
        yield folder, scratch


def _to_load(folder: Path, scratch: Path) -> dict[str, Any]:
    """Return what `reload.load` has to know of a folder.

    That is where it is, and how much memory it may take if there is little.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    most = available_bytes()
    little = (
        {"max_memory": int(most / 2), "offload": str(scratch / "offload")}
        if 1.5 * size > most
        else {}
    )
    return {"folder": str(folder)} | little


def quantised_copy(
    uri: str,
    target: str,
    linears: Sequence[str],
    section: QuantizeSection,
    texts: Mapping[str, NDArray[np.int64]],
    rounded: tuple[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Write the quantised copy of an export, and load it in a process of its own.

    Returns its size, its error and its perplexities.

    Args:
        uri: the export.
        target: folder of the copy.
        linears: names of what is quantised.
        section: how.
        texts: name -> [num_windows, T] tokens to evaluate on.
        rounded: folder with the same weights, rounded, and the files of their scales; if not given,
            they are rounded to the nearest number.

    Raises:
        RuntimeError: it cannot be quantised or loaded.
    """
    files.remove_folder(target)  # of a try that was interrupted
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "small"
        download_folder(uri, small, weights=False)
        for path in small.iterdir():
            if not path.name.endswith((".index.json", ".md")):
                files.put_file(files.join(target, path.name), path)
    source, scales = rounded or (uri, ())
    request: dict[str, Any] = {
        "source": source,
        "export": uri,
        "scales": list(scales),
        "target": target,
        "linears": list(linears),
    }
    request |= {"scheme": section.scheme, "group_size": section.columns_together}
    try:
        copy = run_module("ray_surgeon.export.quantized", request)
        with local_folder(target) as (folder, scratch_folder):
            windows = {name: torch.from_numpy(tokens) for name, tokens in texts.items()}
            tensor_files.write(str(scratch_folder / "windows"), windows)
            about = {
                "windows": str(scratch_folder / "windows"),
                "num_threads": torch.get_num_threads(),
                "shipped_code": False,
            }
            copy["perplexity"] = run_module(
                "ray_surgeon.export.perplexity", about | _to_load(folder, scratch_folder)
            )
    except RuntimeError as error:
        raise RuntimeError(f"the quantised export {target} cannot be made:\n{error}") from error
    return copy


def reload_difference(
    cluster: Cluster,
    uri: str,
    tokens: NDArray[np.int64],
    dtype: str,
    *,
    shipped_code: bool,
    has_experts: bool,
) -> float:
    """Return the largest difference between the workers' logits and the export's.

    The export runs in a process of its own, which also generates.

    Args:
        cluster: with the pruned weights.
        uri: the export.
        tokens: [T] a sequence to compare on.
        dtype: of the job.
        shipped_code: whether modeling code lies beside the weights.
        has_experts: whether the model is a mixture.

    Raises:
        RuntimeError: the fresh process fails; or the logits differ by more than `agree` allows.
    """
    half = has_experts and dtype != "float32"
    some = [int(t) for t in tokens[:NUM_COMPARED_TOKENS]]
    workers_logits = decode(logits(cluster, some), torch.device("cpu"))
    with local_folder(uri) as (folder, scratch):
        logits_file = str(scratch / "logits")
        about = {"shipped_code": shipped_code, "dtype": dtype, "half": half} | _to_load(
            folder, scratch
        )
        request = {"tokens": some, "logits": logits_file} | about
        try:
            run_module("ray_surgeon.export.reload", request)
        except RuntimeError as error:
            raise RuntimeError(
                f"the export {uri} cannot be loaded by transformers:\n{error}"
            ) from error
        reloaded_logits = tensor_files.read(logits_file)["logits"]
    largest = float((workers_logits - reloaded_logits).abs().max())
    if not agree(reloaded_logits, workers_logits, dtype, half=half):
        raise RuntimeError(
            f"the export {uri} loads, but its logits differ from the workers' by {largest:g}; do "
            "not use it"
        )
    return largest
