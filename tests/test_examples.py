"""Examples run as scripts, and look for an engine before they prune."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import serving

ROOT = Path(__file__).parents[1]


def test_examples_run_as_scripts_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/prune_in_memory.py"), "--help"]
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    said = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert "--ray" in said


@pytest.mark.parametrize("name", ["serve_vllm", "serve_llamacpp"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no program"),
        (["--python", "python-without-engine"], "has no package"),
        (["--python", "no-such-python"], "--python: there is no program"),
    ],
)
def test_serving_examples_look_for_the_engine_before_they_prune(
    name: str,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    fails = tmp_path / "python-without-engine"
    fails.write_text("#!/bin/sh\nexit 1\n")
    fails.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(serving, "has_client", lambda: True)
    monkeypatch.setattr(serving, "dense_and_pruned", None)  # calling it would fail
    with pytest.raises(SystemExit):
        importlib.import_module(f"examples.{name}").main()
    assert said in capsys.readouterr().err
