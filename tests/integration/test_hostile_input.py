"""Broken and hostile models, texts and specs end in exit code 2 with a message that names them, in
little time and memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Zygote
from tests.integration.runs import copied_model, tiny_spec

MAX_SECONDS = 30
MAX_BYTES = 2**30
LARGE = 10 * 2**30
WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"


class Case:
    """A tiny model, a text and a spec that a test breaks.

    Attributes:
        model: folder of the model.
        changes: changes of the spec.
        spec: path of a spec that replaces the written one.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = copied_model(model, folder / "model")
        self.changes: dict[str, Any] = {}
        self.spec: Path | None = None


Change = Callable[[Case], object]


def fill(path: Path, content: bytes | int) -> Path:
    """Write bytes, or make a sparse file of a size, or truncate a file to a size."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.touch()
        os.truncate(path, content)
    return path


def of_model(name: str, content: bytes | int | None) -> Change:
    """Change or remove a file of the model."""
    return lambda c: (
        (c.model / name).unlink() if content is None else fill(c.model / name, content)
    )


def of_text(name: str, content: bytes | int) -> Change:
    return lambda c: c.changes.update(
        calibration__source=str(fill(c.folder / f"broken{name}", content))
    )


def of_spec(content: bytes | int) -> Change:
    def change(case: Case) -> None:
        case.spec = fill(case.folder / "written.yaml", content)

    return change


def settings(**changes: Any) -> Change:
    return lambda c: c.changes.update(changes)


def config(file: str = "config.json", **changes: Any) -> Change:
    def change(case: Case) -> None:
        document = json.loads((case.model / file).read_text())
        (case.model / file).write_text(json.dumps(document | changes))

    return change


def header(removed: str = "", **changes: Any) -> Change:
    """Change the entry of a tensor in the header of the weights, and keep the data."""

    def change(case: Case) -> None:
        content = (case.model / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        document = json.loads(content[8 : 8 + length])
        document[UP].update(changes)
        document[UP].pop(removed, None)
        raw = json.dumps(document).encode()
        raw = struct.pack("<Q", len(raw)) + raw
        (case.model / WEIGHTS).write_bytes(raw + content[8 + length :])

    return change


def tensors(change_all: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(case: Case) -> None:
        found = load_file(case.model / WEIGHTS)
        change_all(found)
        save_file(found, case.model / WEIGHTS, metadata={"format": "pt"})

    return change


def index(document: object) -> Change:
    """Write weights under a name that needs an index, and an index."""

    def change(case: Case) -> None:
        (case.model / WEIGHTS).rename(case.model / "model-1.safetensors")
        (case.model / "model.safetensors.index.json").write_text(json.dumps(document))

    return change


def link_to_a_secret(case: Case) -> None:
    (case.folder / "secret").write_text("{}")
    (case.model / "generation_config.json").unlink(missing_ok=True)
    (case.model / "generation_config.json").symlink_to("../secret")


def bomb() -> bytes:
    """Return a YAML document of 300 bytes that expands to a billion values."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
    ]
    return "\n".join([*lines, "version: 2", "name: *a9", ""]).encode()


def pickled(case: Case) -> None:
    (case.model / WEIGHTS).unlink()
    torch.save({UP: torch.ones(2)}, case.model / "pytorch_model.bin")


def stranger(case: Case) -> None:
    config(model_type="evil", auto_map={"AutoConfig": "evil.Config"})(case)
    (case.model / "evil.py").write_text("open('/tmp/evil-ran', 'w')")


def strange_tokenizer(case: Case) -> None:
    code = {"auto_map": {"AutoTokenizer": ["evil.Slow", None]}, "tokenizer_class": "Evil"}
    config("tokenizer_config.json", **code)(case)
    (case.model / "evil.py").write_text("open('/tmp/evil-ran', 'w')")
    (case.model / "tokenizer.json").unlink()


def small_vocabulary(case: Case) -> None:
    config(vocab_size=64)(case)
    tensors(lambda t: t.update({EMBEDDING: t[EMBEDDING][:64].clone()}))(case)


GEMMA = {"model_type": "gemma3_text"}
LEAVES = "pkg://torch/../../../etc/x.gguf"
PYTHON = b"version: !!python/object/apply:os.system ['touch /tmp/evil-ran']"
CASES: list[tuple[Change, list[str]]] = [
    (of_model(WEIGHTS, 5000), [WEIGHTS, "cut short"]),
    (of_model(WEIGHTS, bytes(5000)), [WEIGHTS, "not a safetensors file"]),
    (pickled, ["no .safetensors weights", "pickled weights are not read"]),
    (
        of_model(WEIGHTS, struct.pack("<Q", 10**6) + b"[" * 10**6),
        [WEIGHTS, "header is damaged"],
    ),
    (header("data_offsets"), [WEIGHTS, "header is damaged"]),
    (header(shape=[48, 64]), [WEIGHTS, f"{UP} of shape (48, 64)", "cannot lie at bytes"]),
    (header(dtype="PICKLE"), [UP, "unknown dtype PICKLE"]),
    (tensors(lambda t: t.pop(UP)), [f"1 missing ({UP})", "complete checkpoint"]),
    (
        tensors(lambda t: t.update({UP: t[UP].repeat(2, 1)})),
        [UP, "(96, 32), expected (48, 32)"],
    ),
    (tensors(lambda t: t[UP][0].fill_(torch.nan)), [UP, "32 NaN or infinite weights"]),
    (
        index({"weight_map": {UP: "../../etc/passwd"}}),
        ["index", "missing files", "passwd"],
    ),
    (of_model("config.json", b"[]"), ["config.json", "is a list, expected an"]),
    (of_model("config.json", b"\xff\xfe{}"), ["config.json", "not UTF-8"]),
    (of_model("config.json", LARGE), ["config.json", "10737418240 bytes"]),
    (of_model("config.json", None), ["no config.json"]),
    (config(num_hidden_layers=10**9), ["num_hidden_layers", "expected 1 to 2000"]),
    (config(hidden_size=-32), ["config.json", "fetch it again"]),
    (config(rms_norm_eps="small"), ["transformers cannot read config.json"]),
    (
        stranger,
        ["comes with code of its own (auto_map), which is never run"],
    ),
    (
        config(model_type="gemma3", text_config=GEMMA),
        ["does not fit its config.json"],
    ),
    (of_model("tokenizer.json", None), ["no tokenizer that loads"]),
    (
        strange_tokenizer,
        ["it is code, which is never run, so make a tokenizer.json of it"],
    ),
    (small_vocabulary, ["vocabulary is 64", "belongs to another model"]),
    (link_to_a_secret, ["_config.json", "outside of the model"]),
    (of_text(".txt", b""), ["broken.txt", "0 tokens"]),
    (of_text(".txt", b"caf\xe9 " * 4000), ["calibration: ", "broken.txt", "not UTF-8"]),
    (of_text(".txt", LARGE), ["broken.txt", "line 1 is longer"]),
    (of_text(".jsonl", b'{"text": "a"}\n{"text"'), ["line 2", "broken.jsonl"]),
    (of_text(".jsonl", b'{"text": 3}'), ["record 1", "broken.jsonl"]),
    (of_text(".parquet", b"PAR1 nothing PAR1"), ["broken.parquet"]),
    (settings(model__source=LEAVES), [LEAVES, "inside the package"]),
    (of_spec(b"\x00\x01\xff"), ["written.yaml", "not UTF-8"]),
    (of_spec(PYTHON), ["not valid YAML"]),
    (of_spec(b"a: " + b"[" * 20000), ["not valid YAML"]),
    (of_spec(LARGE), ["written.yaml", "10737418240 bytes"]),
    (of_spec(bomb()), ["written.yaml", "name"]),
    (settings(calibration__num_sequences=10**30), ["calibration"]),
]


@pytest.mark.parametrize(("change", "words"), CASES, ids=[", ".join(w) for _, w in CASES])
def test_hostile_input_ends_in_a_clear_error(
    change: Change, words: list[str], zygote: Zygote, llama: Path, tmp_path: Path
) -> None:
    case = Case(tmp_path, llama)
    change(case)
    spec = case.spec or tiny_spec(tmp_path, case.model, **case.changes)
    numbers = "NaN or infinite" in "".join(words)
    answer = zygote.ask(
        arguments=[str(spec), *(["--workers-may-start"] if numbers else [])]
    )
    assert answer["code"] == 2, answer["text"]
    message = answer["text"][answer["text"].index("error: ") :]
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in message
    assert len(message) < 4000
    assert answer["seconds"] < MAX_SECONDS
    assert answer["peak_bytes"] < MAX_BYTES
    assert not Path("/tmp/evil-ran").exists()


def test_unchanged_case_passes_a_dry_run(
    zygote: Zygote, llama: Path, tmp_path: Path
) -> None:
    """A dry run of the unchanged case succeeds and writes nothing."""
    case = Case(tmp_path, llama)
    answer = zygote.ask(arguments=[str(tiny_spec(tmp_path, case.model)), "--dry-run"])
    assert answer["code"] == 0, answer["text"]
    assert not (tmp_path / "run").exists()
