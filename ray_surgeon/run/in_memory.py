"""A model in memory, written beside its run, where all workers can read it."""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.run.directory import RunDirectory
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import goes_along

_MARKER = ".from_memory"
"""An empty file beside a model that was in memory: the folder is the run's."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def causal_lm(model: Any) -> PreTrainedModel:
    """Return what was given as a model in memory, without the wrapper of ``torch.compile``.

    Raises:
        ValueError: it is no causal LM of transformers, or of a family that is not supported, or has no weights.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: got a {type(model).__name__}; give a causal LM of transformers, such as a LlamaForCausalLM")
    ModelLayout.of(model.config)
    if absent := next((name for name, weight in model.named_parameters() if weight.is_meta), None):
        raise ValueError(f"model: {absent} has no values, it is on the device meta; load the weights first")
    return model


def a_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return what was given as a tokenizer.

    Raises:
        ValueError: it is none of transformers'.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer: got a {type(tokenizer).__name__}; give a tokenizer of transformers, as AutoTokenizer returns")
    return tokenizer


def dtype_of(model: PreTrainedModel) -> str:
    """Return the dtype of a model as a job spec calls it.

    Raises:
        ValueError: no job has this one.
    """
    name = str(model.dtype).removeprefix("torch.")
    if model.dtype not in _DTYPES:
        raise ValueError(f"model: its weights are {name}; give it in float32 or bfloat16, as by model.float()")
    return name


@contextmanager
def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, run: str) -> Iterator[None]:
    """Write a model into a folder of its run, unless the run has begun and has it; take it away if what follows refuses a new run.

    Raises:
        ValueError: the run has another one, the folder holds something else, or it cannot be written.
    """
    try:
        has_begun = _save(model, tokenizer, source, run)
    except OSError as error:
        raise ValueError(f"output.uri: cannot use {run}: {error}; check the address, the permissions and the free space") from error
    try:
        yield
    except BaseException:
        if not has_begun:
            files.remove_folder(source)
        raise


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, run: str) -> bool:
    """Write a model, or compare it with the one that is there, and return whether its run has begun."""
    has_begun = not RunDirectory(run).is_new()
    with tempfile.TemporaryDirectory() as scratch:
        with without_bars():
            _write(model, tokenizer, scratch)
        written = {path.relative_to(scratch).as_posix(): path for path in sorted(Path(scratch).rglob("*")) if path.is_file()}
        chosen = {name: path for name, path in written.items() if goes_along(name) or name.endswith((".safetensors", ".index.json"))}
        if has_begun and files.exists(source):
            there = set(files.list_files(source))
            if not all(name in there and _same(files.join(source, name), path) for name, path in chosen.items()):
                raise ValueError(f"output.uri: {run} holds a run of another model or tokenizer; give output another folder")
        else:
            marker = files.join(source, _MARKER)
            if not files.exists(marker) and files.list_names(source):
                raise ValueError(f"output.uri: {source} holds something else, and the model would go there; give output another folder")
            files.remove_folder(source)  # of a try before the run began
            files.write_text(marker, "")
            for name, path in chosen.items():
                files.put_file(files.join(source, name), path)
    return has_begun


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Write both as transformers does; the model's configuration stays as it is, which `save_pretrained` changes."""
    before = {name: getattr(model.config, name, None) for name in ("architectures", "dtype")}
    try:
        model.save_pretrained(folder)
    except ValueError as error:
        raise ValueError(f"model: transformers does not save it: {error}; mend that first, or prune a folder") from error
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
    tokenizer.save_pretrained(folder)


def _same(uri: str, path: Path) -> bool:
    """Whether a file of the run has the content of one on this machine, byte for byte."""
    if files.is_local(uri):
        return filecmp.cmp(files.open_filesystem(uri)[1], path, shallow=False)
    if files.size_bytes(uri) != path.stat().st_size:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        files.download(uri, Path(scratch) / "file")
        return filecmp.cmp(Path(scratch) / "file", path, shallow=False)


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
