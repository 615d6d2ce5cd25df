"""Pruning is one Python call; the command line is a thin shell over it."""

from __future__ import annotations

import inspect
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import ray_surgeon
from ray_surgeon import JobSpec, pipeline
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.report.events import Moment
from ray_surgeon.run import driver
from ray_surgeon.run.arguments import _as_name
from ray_surgeon.run.inputs import check
from ray_surgeon.run.loop import run_shots
from ray_surgeon.stages.curvature.gather import gather_curvature
from ray_surgeon.storage import files
from tests.conftest import CONFIGS, SPARSE_CONFIGS
from tests.integration.runs import assert_same_shot, beginning, loaded, run, tiny_spec

ROOT = Path(__file__).parent.parent.parent
TEXT = {"source": "python-docs", "num_sequences": 4, "sequence_length": 32, "max_tokens": 4000}
GROUPS = {
    "structure": "groups",
    "groups": ["ffn"],
    "width_multiple": 8,
    "target_sparsity": 0.2,
    "num_shots": 1,
}


def in_memory(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_every_section_is_an_argument(model_folders: dict[str, Path], tmp_path: Path) -> None:
    assert set(JobSpec.model_fields) - {"version"} <= set(
        inspect.signature(ray_surgeon.prune).parameters
    )
    result = ray_surgeon.prune(
        str(model_folders["llama"]),
        calibration=TEXT,
        pruning=GROUPS,
        memory={"weights": "host"},
        output=str(tmp_path),
        progress=False,
    )
    assert result.report["plan"]["stores"]["weights"] == "host"


def test_the_dtype_of_a_checkpoint_is_kept_if_asked_for(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything is computed and exported in float32 otherwise, which a line says; and a section
    `cluster` stays in this process.
    """
    model, tokenizer = in_memory(model_folders["llama"])
    for saved in (model.to(torch.bfloat16), tokenizer):
        saved.save_pretrained(tmp_path / "narrow")
    sizes = {}
    for dtype in (None, "bfloat16"):
        source = (
            tmp_path / "narrow"
            if dtype is None
            else {"source": tmp_path / "narrow", "dtype": dtype}
        )
        output = str(tmp_path / f"run-{dtype}")
        result = ray_surgeon.prune(
            source, calibration=TEXT, pruning=GROUPS, output=output, cluster={"num_shards": 2}
        )
        assert result.report["spec"]["cluster"]["backend"] == "local"
        assert result.report["spec"]["name"] == "narrow"
        said = " ".join(capsys.readouterr().out.split())
        assert (
            "config.json says bfloat16, but this job and its exports are in float32" in said
        ) == (dtype is None)
        sizes[dtype] = result.report["exports"][0]["size_bytes"]
    assert 1.9 < sizes[None] / sizes["bfloat16"] < 2.1
    spec = tiny_spec(tmp_path / "cli", tmp_path / "narrow")
    for options, is_said in (([], True), (["--set", "model.dtype=bfloat16"], False)):
        assert pipeline.main([str(spec), "--dry-run", *options]) == 0
        assert (
            "model.dtype: bfloat16 halves it" in " ".join(capsys.readouterr().out.split())
        ) == is_said


def test_a_model_in_memory_becomes_really_smaller(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = in_memory(model_folders["llama"])
    sections: dict[str, Any] = {
        "calibration": TEXT,
        "pruning": {**GROUPS, "allocation": "uniform"},
        "output": str(tmp_path / "run"),
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = ray_surgeon.prune(model, tokenizer, **sections)
    pruned = result.load()
    assert isinstance(pruned, LlamaForCausalLM)
    assert pruned.config.intermediate_size < model.config.intermediate_size
    assert result.path == str(tmp_path / "run/export/uniform")
    assert 0.2 - 1e-9 <= result.sparsity < 0.3
    assert set(result.perplexity) == {"test"}
    assert result.report["spec"]["name"] == "model"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), (
        "the model in memory stays"
    )
    assert "shot 1/1   commit" in capsys.readouterr().out
    again = ray_surgeon.prune(model, tokenizer, **sections, resume=True, progress=False)
    assert again.perplexity == result.perplexity
    assert capsys.readouterr().out == ""


def test_the_model_of_another_run_is_not_overwritten(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = in_memory(model_folders["llama"])
    sections: dict[str, Any] = {
        "calibration": TEXT,
        "pruning": GROUPS,
        "output": {"uri": str(tmp_path / "run"), "exports": []},
    }
    ray_surgeon.prune(model, tokenizer, **sections, progress=False)
    source = tmp_path / "run/source/model.safetensors"
    before = source.read_bytes()
    with pytest.raises(ValueError, match="already holds this run"):
        ray_surgeon.prune(model, tokenizer, **sections, progress=False)
    model.model.norm.weight.data *= 2
    for resume in (False, True):
        with pytest.raises(ValueError, match="another model or tokenizer"):
            ray_surgeon.prune(model, tokenizer, **sections, progress=False, resume=resume)
    model, tokenizer = in_memory(model_folders["llama"])
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="another model or tokenizer"):
        ray_surgeon.prune(model, tokenizer, **sections, progress=False, resume=True)
    (tmp_path / "checkpoints/source").mkdir(parents=True)
    (tmp_path / "checkpoints/source/adapter_model.safetensors").write_text("my own")
    with pytest.raises(ValueError, match="holds something else"):
        ray_surgeon.prune(
            model, tokenizer, **sections | {"output": str(tmp_path / "checkpoints")}, progress=False
        )
    assert (tmp_path / "checkpoints/source/adapter_model.safetensors").read_text() == "my own"
    (tmp_path / "project").mkdir()
    (tmp_path / "project/thesis.txt").touch()
    with pytest.raises(ValueError, match="holds no run of this program"):
        ray_surgeon.prune(
            model, tokenizer, **sections | {"output": str(tmp_path / "project")}, progress=False
        )
    assert not (tmp_path / "project/source").exists()
    assert source.read_bytes() == before


def test_all_chat_templates_go_along(model_folders: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = in_memory(model_folders["llama"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    result = ray_surgeon.prune(
        model,
        tokenizer,
        calibration=TEXT,
        pruning=GROUPS,
        output="memory://templates",
        progress=False,
    )
    files.download(files.join(result.path, "config.json"), tmp_path / "config.json")
    for name in files.list_files(result.path):
        if "token" in name or "template" in name:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            files.download(files.join(result.path, name), tmp_path / name)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


@pytest.mark.ray
def test_a_path_and_a_whole_spec(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = ray_surgeon.prune(
            str(model_folders["llama"]), calibration=TEXT, pruning=GROUPS, progress=False
        )
        assert torch.get_num_threads() == 2, "the threads of the caller's process are its own"
    finally:
        torch.set_num_threads(before)
    assert result.uri == str(tmp_path / "runs/llama")
    assert type(result.load()).__name__ == "PrunedForCausalLM"
    with pytest.raises(ValueError, match="has no export masked; it has \\['per_block'\\]"):
        result.load("masked")
    spec = ray_surgeon.parse_spec(tiny_spec(tmp_path / "spec", model_folders["llama"]).read_text())
    found = ray_surgeon.prune(spec=spec, progress=False)
    assert run(tmp_path / "cli", model_folders["llama"]) == 0
    assert_same_shot(tmp_path / "cli/run", Path(found.uri), 2)
    with pytest.raises(ValueError, match="has no export for this"):
        _ = found.path


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"calibration": TEXT | {"num_sequences": None}}, "num_sequences"),
        ({"calibration": TEXT | {"num_sequences": [1]}}, "num_sequences"),
        ({"calibration": TEXT | {"num_sequences": "abc"}}, "num_sequences"),
        ({"output": 3}, "output: got 3"),
        ({"output": [1]}, "output: got"),
        ({"output": ""}, "uri"),
        ({"calibration": None}, "calibration: is missing; give the fields"),
        ({"calibration": ["one text", "another"]}, "calibration: got .*; give the fields"),
        (
            {"calibration": TEXT | {"split": "test"}},
            "the calibration reads the test part of its text",
        ),
        ({"pruning": "groups"}, "pruning: got 'groups'; give the fields"),
    ],
)
def test_sections_of_wrong_types_are_named(
    sections: dict[str, Any], message: str, model_folders: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        ray_surgeon.prune(
            str(model_folders["llama"]), **{"calibration": TEXT, "pruning": GROUPS, **sections}
        )


def test_what_is_wrong_is_said_once_in_words(model_folders: dict[str, Path]) -> None:
    """As on the command line: no inner names, and nothing of sections that nobody gave."""
    with pytest.raises(ValueError, match="is not a valid job spec") as caught:
        ray_surgeon.prune(
            str(model_folders["llama"]),
            calibration=TEXT | {"strid": 3},
            pruning=GROUPS | {"target_sparsity": 30},
        )
    first, *lines = str(caught.value).split("\n")
    assert first == "what prune() was given is not a valid job spec:"
    assert [line.split(":")[0].strip() for line in lines] == [
        "calibration.strid",
        "pruning.target_sparsity",
    ]
    with pytest.raises(ValueError, match=r"spec: got a str; give ray_surgeon.parse_spec"):
        ray_surgeon.prune(spec="quickstart.yaml")  # type: ignore[arg-type]
    assert {"prune", "curvature", "JobSpec"} <= set(dir(ray_surgeon))


def test_an_output_may_be_a_path_and_remedies_are_of_python_too(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "calibration": TEXT,
        "pruning": GROUPS,
        "output": tmp_path / "a run",
        "progress": False,
    }
    assert ray_surgeon.prune(str(model_folders["llama"]), **sections).uri == str(tmp_path / "a run")
    with pytest.raises(ValueError, match=r"resume=True in Python.*--set output.uri='.*/a run-2'"):
        ray_surgeon.prune(str(model_folders["llama"]), **sections)


def test_a_perplexity_that_is_no_number_ends_the_run(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of random logits that are huge, the loss is, too."""
    model, tokenizer = in_memory(model_folders["llama"])
    model.lm_head.weight.data *= 1e5
    with pytest.raises(
        FloatingPointError, match="the perplexity on test, or its divergence, is not finite"
    ):
        ray_surgeon.prune(
            model,
            tokenizer,
            calibration=TEXT,
            pruning=GROUPS,
            output=str(tmp_path / "run"),
            progress=False,
        )


def test_an_export_on_another_file_system_is_loaded(model_folders: dict[str, Path]) -> None:
    result = ray_surgeon.prune(
        str(model_folders["llama"]),
        calibration=TEXT,
        pruning=GROUPS,
        output="memory://api/run",
        progress=False,
    )
    assert result.path == "memory://api/run/export/per_block"
    assert sum(p.numel() for p in result.load().parameters()) < sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(model_folders["llama"]).parameters()
    )


def test_bad_arguments_are_said_before_anything_starts(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = in_memory(model_folders["llama"])
    spec = ray_surgeon.parse_spec(tiny_spec(tmp_path, model_folders["llama"]).read_text())
    sections: dict[str, Any] = {
        "calibration": TEXT,
        "pruning": GROUPS,
        "output": str(tmp_path / "out"),
    }
    for arguments, options, message in [
        ((), sections, "model: give a Hub id"),
        ((model,), sections, "needs its tokenizer"),
        ((model.state_dict(),), sections, "model: got a OrderedDict of .*give its source"),
        (({"dtype": "bfloat16"},), sections, "give its source"),
        (({"source": str(model_folders["llama"]), "dtyp": "bfloat16"},), sections, "model.dtyp"),
        ((str(model_folders["llama"]),), {**sections, "cluster": {"address": "auto"}}, "address"),
        ((str(model_folders["llama"]), tokenizer), sections, "belongs to a model in memory"),
        ((model, tokenizer), {**sections, "spec": spec}, "it says everything already"),
        ((model, tokenizer), {**sections, "pruning": {**GROUPS, "widths": 3}}, "widths"),
        ((str(tmp_path / "absent"),), sections, "no folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            ray_surgeon.prune(*arguments, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = ray_surgeon.prun


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_curvature_is_that_of_a_run(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = in_memory(model_folders[family])
    inputs = check(ray_surgeon.parse_spec(tiny_spec(tmp_path, model_folders[family]).read_text()))
    found = ray_surgeon.curvature(model, inputs.calibration)
    cluster = loaded(model_folders[family])
    gather_curvature(cluster, inputs.calibration, "kfac")
    ((_, worker),) = cluster.workers.items()
    assert list(found) == list(worker.shard.linears)
    for name, factors in found.items():
        expected = worker.shard.factors(name)
        assert torch.equal(factors.A, expected.A.dense())
        assert torch.equal(factors.G, expected.G.dense())
        assert factors.num_tokens == inputs.calibration.size
    name = list(found)[2]
    assert list(ray_surgeon.curvature(model, inputs.calibration, linears=[name])) == [name]
    assert not ray_surgeon.curvature(model, inputs.calibration, linears=[])
    gathered = list[str]()
    stop = ModelShard.stop_curvature

    def watch(shard: ModelShard) -> None:
        gathered.extend(name for group in shard.gathering for name in group.names)
        stop(shard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelShard, "stop_curvature", watch)
        alone = ray_surgeon.curvature(model, inputs.calibration, linears=[list(found)[-1]])
    assert {name.rpartition(".")[2] for name in gathered} == {list(found)[-1].rpartition(".")[2]}, (
        "others would take memory"
    )
    assert torch.equal(alone[list(found)[-1]].G, found[list(found)[-1]].G)
    sampled = ray_surgeon.curvature(model, inputs.calibration, linears=[name], label_seed=1)[name]
    assert not torch.equal(sampled.G, found[name].G)
    assert torch.equal(sampled.A, found[name].A)
    texts = [
        "The quick brown fox jumps over the lazy dog.",
        "Another text of another length, a little longer than the first one.",
    ]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert torch.equal(
        ray_surgeon.curvature(model, texts, tokenizer)[name].A,
        ray_surgeon.curvature(model, tokens)[name].A,
    )
    with_bos = [[tokenizer.bos_token_id, *sequence] for sequence in tokens]
    of_texts = ray_surgeon.curvature(model, texts, beginning(tokenizer, "<end> $A"), linears=[name])
    assert torch.equal(of_texts[name].A, ray_surgeon.curvature(model, with_bos)[name].A)
    for sequences, options, message in [
        (texts, {}, "texts need one"),
        ([[3]], {}, r"sequences\[0\]: 1 tokens.*takes 2"),
        ([], {}, "give at least one"),
        (None, {}, "give a list"),
        ("one text", {"tokenizer": tokenizer}, "give a list"),
        ([[1, 2, 999]], {}, "from 1 to 999; the model takes .* 0 to 319"),
        ([[1, -2, 3]], {}, "from -2 to 3; the model takes .* 0 to 319"),
        *([([[1] * 129], {}, "129 tokens .* takes 2 to 128 tokens")] if family == "opt" else []),
        (torch.rand(2, 5), {}, "give a list of integers"),
        (torch.tensor([1, 2, 3]), {}, "give a list of integers"),
        (tokens, {"linears": ["absent"]}, "has no absent; it has for example"),
    ]:
        with pytest.raises(ValueError, match=message):
            ray_surgeon.curvature(model, sequences, **options)  # type: ignore[arg-type]


def test_linears_with_and_without_a_bias_share_no_inputs() -> None:
    """DeepSeek-V3's query projection without low rank never has one; what is beside it may."""
    config = DeepseekV3Config(
        **{**SPARSE_CONFIGS["deepseek_v3"].to_dict(), "q_lora_rank": None, "attention_bias": True}
    )
    model = AutoModelForCausalLM.from_config(config)
    found = ray_surgeon.curvature(model, [[1, 2, 3, 4]])
    attention = "model.layers.0.self_attn"
    assert found[f"{attention}.q_proj"].A.shape == (32, 32)
    assert found[f"{attention}.kv_a_proj_with_mqa"].A.shape == (33, 33)
    torch.testing.assert_close(
        found[f"{attention}.kv_a_proj_with_mqa"].A[:32, :32], found[f"{attention}.q_proj"].A
    )


def test_models_that_see_later_tokens_are_refused() -> None:
    config = Gemma3TextConfig(
        **{**CONFIGS["gemma3"].to_dict(), "use_bidirectional_attention": True}
    )
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        ModelLayout.of(config)


@pytest.mark.parametrize("signum", [signal.SIGTERM, 3])
def test_a_signal_while_ray_starts_is_an_interruption(
    signum: int, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own handler ends the process by the number of the signal."""
    monkeypatch.setattr(driver, "connect_to_ray", lambda _: sys.exit(signum))
    changes = {"cluster": {"backend": "ray"}}
    if signum == signal.SIGTERM:
        assert run(tmp_path, model_folders["llama"], **changes) == 130
    else:
        with pytest.raises(SystemExit):
            run(tmp_path, model_folders["llama"], **changes)


def test_names_of_runs_are_made_of_sources() -> None:
    assert _as_name("meta-llama/Llama-3.2-1B") == "llama-3.2-1b"
    assert _as_name("s3://bucket/My Model/") == "my-model"
    assert _as_name("///") == "model"


def test_long_steps_show_that_they_move(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Sequences in the passes, linears in costs and updates, steps in corrections: all of them, in
    order, to the end.
    """
    changes: dict[str, Any] = {
        "correction__lora_rank": 2,
        "pruning__num_shots": 1,
        "cluster__num_shards": 2,
        "calibration__held_aside": 0,
    }
    inputs = check(
        ray_surgeon.parse_spec(tiny_spec(tmp_path, model_folders["llama"], **changes).read_text())
    )
    moments: list[Moment] = []
    cluster = loaded(model_folders["llama"], 2)
    run_shots(
        inputs,
        cluster,
        RunDirectory(inputs.spec.output.uri),
        lambda news: moments.append(news) if isinstance(news, Moment) else None,
    )
    for step, unit, total in (
        ("curvature", "sequences", 6),
        ("costs", "linears", 28),
        ("update", "linears", 28),
        ("correction", "steps", 3),
    ):
        own = [m for m in moments if m.step == step and m.unit == unit]
        assert (own[-1].done, own[-1].total) == (total, total), step
        assert len({m.done for m in own}) >= total // 2, step
        assert all(m.shot == 1 for m in own)
    curvature = [m for m in moments if m.step == "curvature" and m.done == 3]
    assert curvature[0].tokens_each == 40
    assert curvature[0].tokens_per_s
    assert curvature[0].left_s


def test_the_command_line(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = str(tiny_spec(tmp_path, model_folders["llama"]))
    assert pipeline.cli(["schema"]) == 0
    assert '"JobSpec"' in capsys.readouterr().out
    assert pipeline.cli(["plan", spec]) == 0
    assert "shards: 1, replicas: 1;" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        pipeline.cli(["prune", spec, "--host-memory", "1TB"])
    refused = capsys.readouterr().err
    assert "usage: ray-surgeon prune" in refused
    assert "--host-memory: only for a plan" in refused
    with pytest.raises(SystemExit):
        pipeline.cli(["plan", spec, "--device", "cpu", "--device-memory", "1GB"])
    assert "--device-memory: a CPU has the machine's" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert pipeline.cli(["prune", spec, "--set", "pruning.num_shots=1"]) == 0
    capsys.readouterr()
    plot = str(tmp_path / "p.svg")
    page = str(tmp_path / "c.html")
    assert pipeline.cli(["report", str(tmp_path / "run"), "--plot", plot, "--html", page]) == 0
    assert Path(page).exists()
    for arguments in ([], ["prun"]):
        with pytest.raises(SystemExit):
            pipeline.cli(arguments)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ray-surgeon"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(command in done.stdout for command in ("prune", "plan", "report", "schema"))


@pytest.mark.parametrize("name", ["prune_in_memory", "look_at_curvature", "compare_methods"])
def test_examples_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(str(ROOT))
    runpy.run_module(f"examples.{name}", run_name="__main__")
    expected = {
        "prune_in_memory": "feed-forward width 64 -> 48",
        "look_at_curvature": "sampled G (32, 32)",
        "compare_methods": "Wanda",
    }
    assert expected[name] in capsys.readouterr().out
