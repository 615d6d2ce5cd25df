"""A model in memory: written where workers can read it, and left as its owner set it up."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from ray_surgeon.models.families import family_of
from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import goes_along

_MARKER = ".from_memory"
"""A file beside a model that was in memory, with the digest of all others: the folder is ours."""
_PIECE_BYTES = 1 << 24
_OF_USE = {"transformers_version", "is_local", "local_files_only", "truncation", "padding"}
"""What a configuration or a tokenizer's file says of who wrote it, or of the last text."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def causal_lm(model: Any) -> PreTrainedModel:
    """Return what was given as a model in memory, without the wrapper of ``torch.compile``.

    Raises:
        ValueError: it is no causal LM of transformers, or of a family that is not supported, or has
            no weights.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        family_of(model.config)
    if not isinstance(model, PreTrainedModel) or not isinstance(
        model, MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    ):
        raise ValueError(
            f"model: got a {type(model).__name__}; give a causal LM of transformers, such as a "
            "LlamaForCausalLM"
        )
    if absent := next((name for name, weight in model.named_parameters() if weight.is_meta), None):
        raise ValueError(
            f"model: {absent} has no values, it is on the device meta; load the weights first"
        )
    return model


def a_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return what was given as a tokenizer.

    Raises:
        ValueError: it is none of transformers'.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer: got a {type(tokenizer).__name__}; give a tokenizer of transformers, as "
            "AutoTokenizer returns"
        )
    return tokenizer


def dtype_of(model: PreTrainedModel) -> str:
    """Return the dtype of a model as a job spec calls it.

    Raises:
        ValueError: no job has this one.
    """
    name = str(model.dtype).removeprefix("torch.")
    if model.dtype not in _DTYPES:
        raise ValueError(
            f"model: its weights are {name}; give it in float32 or bfloat16, as by model.float()"
        )
    return name


@contextmanager
def saved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, run: str
) -> Iterator[None]:
    """Write a model into a folder of its run, unless the run has begun and has it.

    It is taken away again if no try of the run begins.

    Raises:
        ValueError: the run has another one, the folder holds something else, or it cannot be
            written.
    """
    directory = RunDirectory(run)
    with tempfile.TemporaryDirectory() as scratch:
        _write(model, tokenizer, scratch)
        paths = filter(Path.is_file, sorted(Path(scratch).rglob("*")))
        written = {path.relative_to(scratch).as_posix(): path for path in paths}
        chosen = {
            name: path
            for name, path in written.items()
            if goes_along(name) or name.endswith((".safetensors", ".index.json"))
        }
        try:
            digest = _digest_of(chosen)
            is_there = _is_there(chosen, digest, source, has_begun=not directory.is_new())
            before = directory.last_attempt()
            if not is_there:
                _put(chosen, digest, source)
        except OSError as error:
            raise ValueError(
                f"output.uri: cannot use {run}: {error}; check the address, the permissions and "
                "the free space"
            ) from error
    try:
        yield
    except BaseException:
        with suppress(OSError, ValueError):
            if not is_there and directory.last_attempt() == before:  # none has begun meanwhile
                files.remove_folder(source)
        raise


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Write model and tokenizer as transformers does.

    The model's configuration stays as it is, which `save_pretrained` changes.
    """
    before = {name: getattr(model.config, name, None) for name in ("architectures", "dtype")}
    try:
        with without_bars():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ValueError as error:
        raise ValueError(
            f"model: transformers cannot save it: {error}; fix that first, or prune a folder"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model: cannot be written to {folder}: {error}; free space there, or set TMPDIR"
        ) from error
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


def _is_there(chosen: Mapping[str, Path], digest: str, source: str, *, has_begun: bool) -> bool:
    """Whether the run has begun, with these files, and has them all.

    Raises:
        ValueError: it has another model, or the folder holds something else.
    """
    names = set(files.list_files(source))
    if names and _MARKER not in names:
        raise ValueError(
            f"output.uri: {source} holds something else, and the model would go there; give output "
            "another folder"
        )
    if not has_begun or not names:
        return False
    if files.read_text(files.join(source, _MARKER)) != digest:
        raise ValueError(
            f"output.uri: {source} holds another model or tokenizer, with which the run began; "
            "give output another folder"
        )
    return names == {_MARKER, *chosen}


def _put(chosen: Mapping[str, Path], digest: str, source: str) -> None:
    """Write files into a folder of the run's own; a killed process may leave some."""
    try:
        files.remove_folder(source)  # of a try before the run began
        files.write_text(files.join(source, _MARKER), digest)
        for name, path in chosen.items():
            files.put_file(files.join(source, name), path)
    except BaseException:
        files.remove_folder(source)
        raise


def _digest_of(chosen: Mapping[str, Path]) -> str:
    """Return a digest of files: JSON but for what changes with the use of a tokenizer."""
    digest = hashlib.blake2b()
    for name, path in chosen.items():
        digest.update(name.encode())
        if name.endswith(".json"):
            document = {k: v for k, v in json.loads(path.read_text()).items() if k not in _OF_USE}
            digest.update(json.dumps(document, sort_keys=True).encode())
            continue
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()


@contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers show no progress bars meanwhile."""
    shows_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_bars:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def own_modes() -> Iterator[None]:
    """Leave outside what the caller's process and thread are in, and give it back.

    These are torch's number of threads, the precision of products
    (``torch.set_float32_matmul_precision``), a default device, `no_grad`, `inference_mode` and
    `autocast`.
    """
    backends: Any = torch.backends
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        for products in (backends.mkldnn.matmul, backends.cuda.matmul):
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"  # in all threads of the process
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
