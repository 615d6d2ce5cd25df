"""Broken and hostile models, texts and specs: each ends in exit code 2 with a message that names
it, soon and within little memory.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Zygote
from tests.integration.runs import tiny_spec

MAX_SECONDS = 30
MAX_BYTES = 2**30


class Case:
    """A tiny model, a text and a spec, to be broken.

    Attributes:
        model: folder.
        text: file of the calibration.
        changes: of the spec.
        spec: in place of the spec that would be written.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = Path(shutil.copytree(model, folder / "model"))
        self.text = folder / "broken.txt"
        self.changes: dict[str, Any] = {}
        self.spec: Path | None = None

    def config(self, **changes: Any) -> None:
        document = json.loads((self.model / "config.json").read_text())
        (self.model / "config.json").write_text(json.dumps(document | changes))

    def tokenizer_config(self, **changes: Any) -> None:
        document = json.loads((self.model / "tokenizer_config.json").read_text())
        (self.model / "tokenizer_config.json").write_text(json.dumps(document | changes))

    def header(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Rewrite the header of the weights, leaving the bytes of the tensors as they are."""
        content = (self.model / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        (self.model / "model.safetensors").write_bytes(
            struct.pack("<Q", len(raw)) + raw + content[8 + length :]
        )

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.model / "model.safetensors")
        change(tensors)
        save_file(tensors, self.model / "model.safetensors", metadata={"format": "pt"})

    def index(self, document: object) -> None:
        self.index_text(json.dumps(document))

    def index_text(self, text: str) -> None:
        """Beside a file of weights that needs an index, because it is not `model.safetensors`."""
        (self.model / "model.safetensors").rename(self.model / "model-1.safetensors")
        (self.model / "model.safetensors.index.json").write_text(text)

    def calibrate_on(self, content: bytes, suffix: str = ".txt") -> None:
        self.text = self.folder / f"broken{suffix}"
        self.text.write_bytes(content)
        self.changes["calibration__source"] = str(self.text)


UP = "model.layers.0.mlp.up_proj.weight"


def sparse(path: Path, num_bytes: int) -> None:
    """Make a file that is large and takes no room."""
    with open(path, "wb") as file:
        file.truncate(num_bytes)


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = torch.cat([tensors[UP], tensors[UP]])


def poison(value: float, name: str = UP) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = value

    return change


def bomb(case: Case) -> None:
    """Nine lists of nine references each: a YAML of 300 bytes that says a billion things."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
    ]
    case.spec = case.folder / "bomb.yaml"
    case.spec.write_text("\n".join(lines) + "\nversion: 2\nname: *a9\n")


def written_spec(text: str | bytes) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        case.spec = case.folder / "written.yaml"
        case.spec.write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def pickled(case: Case) -> None:
    (case.model / "model.safetensors").unlink()
    torch.save({UP: torch.ones(2)}, case.model / "pytorch_model.bin")


def pickle_with_another_name(case: Case) -> None:
    (case.model / "model.safetensors").write_bytes(pickle.dumps({UP: list(range(1000))}))


def stranger(case: Case) -> None:
    case.config(
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        model_type="evil",
    )
    (case.model / "evil.py").write_text("open('/tmp/evil-ran', 'w')")


def strange_tokenizer(case: Case) -> None:
    case.tokenizer_config(auto_map={"AutoTokenizer": ["evil.Slow", None]}, tokenizer_class="Evil")
    (case.model / "evil.py").write_text("raise SystemExit('code of a stranger ran')")
    (case.model / "tokenizer.json").unlink()


def large_text(case: Case) -> None:
    case.calibrate_on(b"")
    sparse(case.text, 10 * 2**30)


def large_lines(case: Case) -> None:
    case.calibrate_on(b"", ".jsonl")
    sparse(case.text, 10 * 2**30)


def large_spec(case: Case) -> None:
    case.spec = case.folder / "large.yaml"
    sparse(case.spec, 10 * 2**30)


def small_vocabulary(case: Case) -> None:
    case.config(vocab_size=64)
    case.tensors(
        lambda t: t.update(
            {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:64].clone()}
        )
    )


def secret_link(case: Case) -> None:
    (case.folder / "secret").write_text("{}")
    link(case.model / "generation_config.json", "../secret")


CASES: dict[str, tuple[Callable[[Case], object], list[str]]] = {
    "weights-truncated": (
        lambda c: os.truncate(c.model / "model.safetensors", 5000),
        ["model.safetensors", "cut short"],
    ),
    "weights-padded": (
        lambda c: os.truncate(c.model / "model.safetensors", 10**6),
        ["model.safetensors", "cut short or padded"],
    ),
    "weights-empty": (
        lambda c: os.truncate(c.model / "model.safetensors", 0),
        ["model.safetensors", "0 bytes"],
    ),
    "weights-of-zeros": (
        lambda c: sparse(c.model / "model.safetensors", 10 * 2**30),
        ["model.safetensors", "not a safetensors file"],
    ),
    "header-longer-than-file": (
        lambda c: (c.model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        ["model.safetensors", "not a safetensors file"],
    ),
    "header-no-json": (
        lambda c: (c.model / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b'{"a": [1,'),
        ["model.safetensors", "header is damaged"],
    ),
    "header-a-list": (
        lambda c: (c.model / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"),
        ["model.safetensors", "header is damaged"],
    ),
    "header-deep": (
        lambda c: (c.model / "model.safetensors").write_bytes(
            struct.pack("<Q", 10**6) + b"[" * 10**6
        ),
        ["model.safetensors", "header is damaged"],
    ),
    "header-lies-about-shape": (
        lambda c: c.header(lambda h: h[UP].update(shape=[48, 64])),
        ["model.safetensors", f"{UP} of shape (48, 64)", "cannot lie at bytes"],
    ),
    "header-lies-about-dtype": (
        lambda c: c.header(lambda h: h[UP].update(dtype="F64")),
        [UP, "dtype F64 cannot lie"],
    ),
    "header-unknown-dtype": (
        lambda c: c.header(lambda h: h[UP].update(dtype="PICKLE")),
        [UP, "unknown dtype PICKLE"],
    ),
    "header-overlapping": (
        lambda c: c.header(
            lambda h: h[UP].update(data_offsets=h["model.norm.weight"]["data_offsets"])
        ),
        ["model.safetensors", "cannot lie at bytes"],
    ),
    "header-negative-shape": (
        lambda c: c.header(lambda h: h[UP].update(shape=[-48, -32])),
        [UP, "cannot lie at bytes"],
    ),
    "header-without-offsets": (
        lambda c: c.header(lambda h: h[UP].pop("data_offsets")),
        ["model.safetensors", "header is damaged"],
    ),
    "tensor-missing": (
        lambda c: c.tensors(lambda t: t.pop(UP)),
        ["1 missing", UP, "complete checkpoint"],
    ),
    "tensor-of-another-shape": (lambda c: c.tensors(widen), [UP, "(96, 32), expected (48, 32)"]),
    "tensor-nan": (lambda c: c.tensors(poison(float("nan"))), [UP, "1 NaN or infinite weights"]),
    "tensor-infinite": (
        lambda c: c.tensors(poison(float("inf"))),
        [UP, "1 NaN or infinite weights"],
    ),
    "embedding-nan": (
        lambda c: c.tensors(poison(float("nan"), "model.embed_tokens.weight")),
        ["model.embed_tokens.weight", "1 NaN or infinite weights"],
    ),
    "weights-pickled": (pickled, ["no .safetensors weights", "pickled weights are not read"]),
    "pickle-named-safetensors": (
        pickle_with_another_name,
        ["model.safetensors", "not a safetensors file"],
    ),
    "index-leaves-the-folder": (
        lambda c: c.index({"weight_map": {UP: "../../etc/passwd"}}),
        ["index", "missing files", "passwd"],
    ),
    "index-absolute": (
        lambda c: c.index({"weight_map": {UP: "/etc/passwd"}}),
        ["index", "missing files", "passwd"],
    ),
    "index-names-an-absent-file": (
        lambda c: c.index({"weight_map": {UP: "model-2.safetensors"}}),
        ["index", "model-2.safetensors"],
    ),
    "index-a-list": (lambda c: c.index([UP]), ["index", "no weight_map"]),
    "index-of-numbers": (lambda c: c.index({"weight_map": {UP: 3}}), ["index", "no weight_map"]),
    "index-empty": (lambda c: c.index_text(""), ["index.json", "not valid JSON"]),
    "config-empty": (
        lambda c: (c.model / "config.json").write_text(""),
        ["config.json", "not valid JSON"],
    ),
    "config-a-list": (
        lambda c: (c.model / "config.json").write_text("[]"),
        ["config.json", "is a list, expected an object"],
    ),
    "config-deep": (
        lambda c: (c.model / "config.json").write_text("[" * 10**6),
        ["config.json", "not valid JSON"],
    ),
    "config-not-utf8": (
        lambda c: (c.model / "config.json").write_bytes(b"\xff\xfe{}"),
        ["config.json", "not UTF-8"],
    ),
    "config-of-10-gb": (
        lambda c: sparse(c.model / "config.json", 10 * 2**30),
        ["config.json", "10737418240 bytes"],
    ),
    "config-missing": (lambda c: (c.model / "config.json").unlink(), ["no config.json"]),
    "config-billion-blocks": (
        lambda c: c.config(num_hidden_layers=10**9),
        ["num_hidden_layers", "expected 1 to 2000"],
    ),
    "config-no-blocks": (lambda c: c.config(num_hidden_layers=0), ["num_hidden_layers", "'0'"]),
    "config-negative-width": (lambda c: c.config(hidden_size=-32), ["hidden_size", "'-32'"]),
    "config-absurd-width": (
        lambda c: c.config(intermediate_size=10**12),
        ["intermediate_size", "expected 1 to"],
    ),
    "config-absurd-vocabulary": (
        lambda c: c.config(vocab_size=10**15),
        ["vocab_size", "expected 1 to"],
    ),
    "config-text-for-a-number": (
        lambda c: c.config(num_attention_heads="four"),
        ["num_attention_heads", "'four'"],
    ),
    "config-heads-that-do-not-fit": (
        lambda c: c.config(num_attention_heads=5, num_key_value_heads=3),
        ["model.source", "config.json"],
    ),
    "config-unknown-activation": (
        lambda c: c.config(hidden_act="evil"),
        ["model.source", "config.json"],
    ),
    "config-code-of-a-stranger": (stranger, ["known families"]),
    "tokenizer-empty": (lambda c: (c.model / "tokenizer.json").write_text(""), ["tokenizer"]),
    "tokenizer-of-10-gb": (
        lambda c: sparse(c.model / "tokenizer.json", 10 * 2**30),
        ["tokenizer.json", "10737418240 bytes"],
    ),
    "tokenizer-no-json": (
        lambda c: (c.model / "tokenizer.json").write_text("{{{"),
        ["no tokenizer that loads"],
    ),
    "tokenizer-code-of-a-stranger": (strange_tokenizer, ["no tokenizer that loads"]),
    "tokenizer-of-a-larger-model": (
        small_vocabulary,
        ["vocabulary is 64", "belongs to another model"],
    ),
    "link-to-nowhere": (
        lambda c: link(c.model / "model.safetensors", "nowhere"),
        ["no .safetensors weights"],
    ),
    "link-in-a-circle": (
        lambda c: link(c.model / "config.json", "config.json"),
        ["no config.json"],
    ),
    "link-out-of-the-model": (secret_link, ["generation_config.json", "outside of the model"]),
    "text-empty": (lambda c: c.calibrate_on(b""), ["broken.txt", "0 tokens"]),
    "text-not-utf8": (
        lambda c: c.calibrate_on(b"caf\xe9 " * 4000),
        ["calibration: ", "broken.txt", "not UTF-8"],
    ),
    "text-one-token": (lambda c: c.calibrate_on(b"\n" * 30000), ["broken.txt", "different tokens"]),
    "text-of-10-gb": (large_text, ["broken.txt", "line 1 is longer"]),
    "lines-of-10-gb": (large_lines, ["broken.jsonl", "line 1 is longer"]),
    "lines-no-json": (
        lambda c: c.calibrate_on(b'{"text": "a"}\n{"text"', ".jsonl"),
        ["line 2", "broken.jsonl"],
    ),
    "lines-deep": (lambda c: c.calibrate_on(b"[" * 10**6, ".jsonl"), ["line 1", "broken.jsonl"]),
    "lines-without-text": (
        lambda c: c.calibrate_on(b'{"text": 3}', ".jsonl"),
        ["record 1", "broken.jsonl"],
    ),
    "parquet-that-is-none": (
        lambda c: c.calibrate_on(b"PAR1 nothing PAR1", ".parquet"),
        ["broken.parquet"],
    ),
    "parquet-empty": (lambda c: c.calibrate_on(b"", ".parquet"), ["broken.parquet"]),
    "package-path-leaves-the-package": (
        lambda c: c.changes.update(model__source="pkg://torch/../../../etc/x.gguf"),
        ["pkg://torch/../../../etc/x.gguf", "inside the package"],
    ),
    "package-absolute": (
        lambda c: c.changes.update(model__source="pkg://torch//etc/x.gguf"),
        ["pkg://torch//etc/x.gguf"],
    ),
    "spec-empty": (written_spec(""), ["must be a mapping"]),
    "spec-binary": (written_spec(b"\x00\x01\xff"), ["written.yaml", "not UTF-8"]),
    "spec-with-python": (
        written_spec("version: !!python/object/apply:os.system ['touch /tmp/evil-ran']"),
        ["not valid YAML"],
    ),
    "spec-deep": (written_spec("a: " + "[" * 20000), ["not valid YAML"]),
    "spec-tag-that-does-not-fit": (written_spec("version: !!bool x"), ["not valid YAML"]),
    "spec-impossible-date": (written_spec("version: 2026-13-45"), ["YAML"]),
    "spec-of-10-gb": (large_spec, ["large.yaml", "10737418240 bytes"]),
    "spec-bomb": (bomb, ["bomb.yaml", "name"]),
    "spec-nan": (
        lambda c: c.changes.update(pruning__target_sparsity=float("nan")),
        ["pruning.target_sparsity", "finite"],
    ),
    "spec-huge-number": (
        lambda c: c.changes.update(calibration__num_sequences=10**30),
        ["calibration"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ends_in_a_clear_error(
    name: str, zygote: Zygote, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    case = Case(tmp_path, model_folders["llama"])
    change, words = CASES[name]
    change(case)
    spec = case.spec or tiny_spec(tmp_path, case.model, **case.changes)
    numbers = "NaN or infinite" in "".join(words)
    answer = zygote.ask(arguments=[str(spec), *(["--workers-may-start"] if numbers else [])])
    assert answer["code"] == 2, answer["text"]
    message = answer["text"][answer["text"].index("error: ") :]
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in message
    assert len(message) < 4000
    assert answer["seconds"] < MAX_SECONDS
    assert answer["peak_bytes"] < MAX_BYTES
    assert not Path("/tmp/evil-ran").exists()


def test_the_case_itself_is_sound(
    zygote: Zygote, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Without a change it passes, so that each case fails by its change alone."""
    case = Case(tmp_path, model_folders["llama"])
    answer = zygote.ask(arguments=[str(tiny_spec(tmp_path, case.model)), "--dry-run"])
    assert answer["code"] == 0, answer["text"]


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40
