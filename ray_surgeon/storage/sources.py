"""Sources of models: a folder, an fsspec URI, the Hub, or a GGUF file in a package."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

from ray_surgeon.config.base import refusing
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.errors import ConfigError
from ray_surgeon.storage import copies, files, tensor_files

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Base class of the errors of the HTTP client that the Hub's library uses.

A refused connection raises it.
"""

SMALL_FILES: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a checkpoint folder, other than weights, that a tokenizer or a reload may need."""
_INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
"""The folder of chat templates beside the first one."""


def goes_along(name: str) -> bool:
    """Whether a file of a checkpoint, by its name, is copied beside an export's weights."""
    return name in SMALL_FILES or (
        name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja")
    )


@dataclass(frozen=True)
class ModelFiles:
    """The files of one checkpoint, opened on demand."""

    origin: str  # the source as the user named it, for errors
    # the source with the commit that was found, so that every worker reads the same
    pinned: ModelSection
    names: tuple[str, ...]  # files that are there
    # file name -> URI for ranged reads; a local path if a copy is on this machine
    open_uri: Callable[[str], str]
    fetch: Callable[[str], Path]  # file name -> local path, downloading it if need be
    _reader: tensor_files.Reader = field(default_factory=tensor_files.Reader)

    def small_files_folder(self, *, weights: bool = False) -> Path:
        """Return a local folder with configuration and tokenizer, and with the weights if wanted.

        Raises:
            ValueError: there is no config.json.
        """
        if "config.json" not in self.names:
            raise ConfigError(
                field="model.source",
                found=f"{self.origin} has no config.json",
                remedy="give a checkpoint",
            )
        names = [name for name in SMALL_FILES if name in self.names]
        if weights:
            names.extend(self.weight_files())
            if _INDEX in self.names:
                names.append(_INDEX)
        paths = [self.fetch(name) for name in names]
        if not weights and len({path.parent for path in paths}) == 1:
            return paths[0].parent
        digest = hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()[:32]

        def link(folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            for path in paths:
                # of a try that was interrupted
                (folder / path.name).unlink(missing_ok=True)
                (folder / path.name).symlink_to(path.resolve())

        return copies.made_once("small", digest, link)

    @property
    def has_weights(self) -> bool:
        """Whether there is a file of weights that can be read."""
        kinds = (".safetensors", ".safetensors.index.json")
        return any(name.endswith(kinds) for name in self.names)

    def weight_files(self) -> list[str]:
        """Return the safetensors files that hold the weights.

        Raises:
            ValueError: there are none, or the index names files that are not there.
        """
        # transformers reads it, too, whatever else is there
        if "model.safetensors" in self.names:
            return ["model.safetensors"]
        if _INDEX in self.names:
            return self._files_in_index()
        names = [name for name in self.names if name.endswith(".safetensors")]
        if not names:
            raise ConfigError(
                field="model.source",
                found=f"{self.origin} has no .safetensors weights",
                remedy=(
                    "pickled weights are not read. Convert it once with "
                    "`model.save_pretrained(folder)`"
                ),
            )
        return names

    def _files_in_index(self) -> list[str]:
        index = f"model.source: the index of {self.origin}"
        kinds = (AttributeError, KeyError, TypeError)
        with refusing(
            f"{index} has no weight_map of names to files", "fetch it again", kinds
        ):
            named = set(files.read_json(str(self.fetch(_INDEX)))["weight_map"].values())
        missing = [name for name in named if name not in self.names or "/" in name]
        if missing or not named:
            first_missing = sorted(missing, key=str)[:3]
            raise ValueError(
                f"{index} names missing files: {first_missing}; fetch it again"
            )
        return sorted(named)

    def shapes_and_fingerprint(self) -> tuple[dict[str, tuple[int, ...]], str]:
        """Return key -> shape of every tensor, and a SHA-256 of the checkpoint.

        The SHA-256 is over config, headers, sizes and the last tensors' ends.

        Not over all the weights, which would read a large model whole; another model of the same
        shapes is told by its ends.

        Raises:
            ValueError: a weight is no float of 16 bits or more, and its scale would not be read.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        digest = hashlib.sha256(self.fetch("config.json").read_bytes())
        wide = ("F64", "F32", "F16", "BF16")
        for name in self.weight_files():
            header = tensor_files.read_header(self.open_uri(name))
            for key, entry in header.entries.items():
                if key.endswith(".weight") and entry.dtype not in wide:
                    raise ConfigError(
                        field="model.source",
                        found=f"{key} of {self.origin} is {entry.dtype}, so it is quantised",
                        remedy=(
                            "give float32 or bfloat16, and quantise what is left: output.quantize"
                        ),
                    )
            shapes.update(header.shapes)
            digest.update(header.fingerprint.encode())
        return shapes, digest.hexdigest()

    @functools.cached_property
    def uri_of(self) -> dict[str, str]:
        """Key of every tensor -> URI of its file; reads the headers of the weight files."""
        uri_of = {}
        for name in self.weight_files():
            uri = self.open_uri(name)
            for key in self._reader.names(uri):
                uri_of[key] = uri
        return uri_of

    @property
    def is_local(self) -> bool:
        """Whether all weights are on this machine."""
        return all(map(files.is_local, set(self.uri_of.values())))

    def read(self, key: str, entry: int | None = None) -> Tensor:
        """Return one tensor, or only an entry of its first dimension; it must not be written to.

        Of files that are not on this machine only its bytes are read.
        """
        return self._reader.read(self.uri_of[key], key, entry)


def open_model(source: ModelSection) -> ModelFiles:
    """Open a checkpoint wherever it is.

    Args:
        source: what the job spec says.

    Raises:
        ValueError: it is not there or is not a checkpoint; says where it was looked for and what to
            do.
    """
    where = source.source
    if where.startswith("pkg://"):
        return _folder(source, str(copies.converted(copies.package_file(source))))
    if "://" in where:
        return _folder(source, where)
    if Path(where).is_dir():
        if source.revision is not None:
            raise ConfigError(
                field="model.revision",
                found=f"{where} is a local folder",
                remedy="remove it",
            )
        return _folder(source, str(Path(where).resolve()))
    if where.startswith((".", "/", "~")) or where.count("/") > 1:
        raise ConfigError(
            field="model.source",
            found=f"there is no folder {where!r} (looked in {os.getcwd()})",
            remedy="give a folder, a URI or a Hub id",
        )
    return _hub(source)


def _folder(source: ModelSection, uri: str) -> ModelFiles:
    remedy = "check the address, the credentials and the network"
    with refusing(f"model.source: cannot list {uri}", remedy):
        templates = files.list_names(files.join(uri, TEMPLATES))
        names = files.list_names(uri) + [f"{TEMPLATES}/{name}" for name in templates]
    if files.is_local(uri):
        folder = Path(files.open_filesystem(uri)[1]).resolve()
        names = [name for name in names if (folder / name).is_file()]
        _refuse_links_outside(folder, names)
    elif not names:
        raise ConfigError(
            field="model.source",
            found=f"nothing at {uri}",
            remedy="check bucket, key and credentials",
        )
    address = functools.partial(files.join, uri)

    def fetch(name: str) -> Path:
        return copies.local_copy(address(name))

    return ModelFiles(
        origin=source.source,
        pinned=source,
        names=tuple(names),
        open_uri=address,
        fetch=fetch,
    )


def _refuse_links_outside(folder: Path, names: Sequence[str]) -> None:
    """Refuse small files that are links out of the folder, because exports copy their content.

    Weights may lie elsewhere, and the Hub's cache keeps the content of all files in `blobs`.
    """
    for name in filter(goes_along, names):
        target = (folder / name).resolve()
        if folder not in target.parents and target.parent.name != "blobs":
            raise ConfigError(
                field="model.source",
                found=f"{folder / name} is a link to {target}, outside of the model",
                remedy="put the file itself there",
            )


def _hub(source: ModelSection) -> ModelFiles:
    revision = source.revision
    api = HfApi()
    named = f"{source.source!r} (revision {revision or 'main'})"
    refused = f"model.source: cannot read {named} from the Hub, and it is no local folder"
    remedy = "check the id, HF_TOKEN and the network, or give a folder"
    with refusing(
        refused, remedy, (HTTP_ERROR, HFValidationError, OSError, RuntimeError)
    ):
        info = api.model_info(source.source, revision=revision)
        if revision is None and not any(
            name.endswith(".safetensors") for name in _names(info)
        ):
            # the Hub's own bot proposes them beside pickles
            for proposal in api.get_repo_discussions(info.id, author="SFconvertbot"):
                if proposal.title == "Adding `safetensors` variant of this model":
                    if proposal.git_reference:
                        info = api.model_info(info.id, revision=proposal.git_reference)
                    break
    repo = info.id  # the whole name: old repositories have a short one, too (gpt2)
    commit = info.sha

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=commit))

    def open_uri(name: str) -> str:
        cached = try_to_load_from_cache(repo, name, revision=commit)
        if isinstance(cached, str):
            return cached
        return f"hf://{repo}@{commit}/{name}"

    pinned = source.model_copy(update={"source": repo, "revision": commit})
    return ModelFiles(
        origin=source.source,
        pinned=pinned,
        names=_names(info),
        open_uri=open_uri,
        fetch=fetch,
    )


def _names(info: ModelInfo) -> tuple[str, ...]:
    return tuple(sibling.rfilename for sibling in info.siblings or ())
