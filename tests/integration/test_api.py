"""The Python functions `prune` and `curvature`, and the command line."""

from __future__ import annotations

import ast
import inspect
import runpy
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import ray_surgeon
from ray_surgeon import JobSpec, pipeline
from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.factors.collector import gather_curvature
from ray_surgeon.job import run_job
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.report.events import ProgressReport
from ray_surgeon.run import driver
from ray_surgeon.storage import files
from tests.integration import runs
from tests.integration.runs import LORA, ONE, Given, Jobs, assert_same_shot, loaded

ROOT = Path(__file__).parent.parent.parent
TEXT = {
    "source": "python-docs",
    "num_sequences": 4,
    "sequence_length": 32,
    "max_tokens": 4000,
}
GROUPS: dict[str, Any] = {"structure": "groups", "groups": ["ffn"], "width_multiple": 8}
GROUPS |= {"target_sparsity": 0.2, "num_shots": 1}


def prune(*given: Any, **sections: Any) -> ray_surgeon.PruneResult:
    defaults: dict[str, Any] = {"calibration": TEXT, "pruning": GROUPS, "progress": False}
    return ray_surgeon.prune(*given, **defaults | sections)


def test_dtype_of_a_checkpoint_is_kept_on_request(given: Given, job: Jobs) -> None:
    """Without the request, the job runs in float32 and prints so. A binary tokenizer file is
    copied, and a `cluster` section keeps the local backend.
    """
    narrow = job.folder / "narrow"
    given[0].to(torch.bfloat16).save_pretrained(narrow)
    given[1].save_pretrained(narrow)
    (narrow / "tokenizer.model").write_bytes(b"\xff\xfe\x00binary")  # as in Llama-2
    output = job.folder / "a run"
    source = {"source": narrow, "dtype": "bfloat16"}
    result = prune(source, output=output, cluster={"num_shards": 2})
    assert result.uri == str(output)
    assert result.report["spec"]["cluster"]["backend"] == "local"
    assert result.report["spec"]["name"] == "narrow-20pct"
    size = sum(p.numel() for p in result.load().parameters())
    assert (Path(result.path) / "tokenizer.model").read_bytes() == b"\xff\xfe\x00binary"
    assert 1.9 < result.report["exports"][0]["size_bytes"] / size < 2.5
    for options, is_said in ({}, True), ({"model__dtype": "bfloat16"}, False):
        said = " ".join(job(options, "--dry-run", model=narrow).out.split())
        assert ("but this job and its exports are in float32" in said) == is_said
        assert ("model.dtype: bfloat16 halves it" in said) == is_said


def test_interrupted_call_says_how_to_resume(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_surgeon.api.run", interrupted)
    output = str(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        prune(str(llama), output=output, progress=True)
    said = capsys.readouterr().out
    assert f"continue with the same call and resume=True (output={output!r})" in said


def test_model_in_memory_is_pruned_to_a_smaller_model(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model stays as it is, and a run does not overwrite the folder of another model."""
    model, tokenizer = given
    sections: dict[str, Any] = {"pruning": GROUPS | {"allocation": "uniform"}}
    output = str(tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = prune(*given, **sections, output=output, progress=True)
    pruned = result.load()
    assert isinstance(pruned, LlamaForCausalLM)
    assert pruned.config.intermediate_size < model.config.intermediate_size
    assert result.path == str(tmp_path / "run/export/uniform")
    assert 0.2 - 1e-9 <= result.sparsity < 0.3
    assert set(result.perplexity) == {"test"}
    assert result.report["spec"]["name"] == "model-20pct"
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    ), "the model in memory does not change"
    assert "round 1/1  commit" in capsys.readouterr().out
    again = prune(*given, **sections, output=output, resume=True)
    assert again.perplexity == result.perplexity
    assert capsys.readouterr().out == ""
    for name in ("checkpoints/source/adapter_model.safetensors", "project/thesis.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("my own")

    def refused(message: str, output: str = output, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            prune(*given, **sections, output=output, **options)

    refused("already holds this run")
    refused("holds something else", str(tmp_path / "checkpoints"))
    refused("holds no run of this program", str(tmp_path / "project"))
    tokenizer.chat_template = "{{ messages }}"
    refused("another model or tokenizer", resume=True)
    own = tmp_path / "checkpoints/source/adapter_model.safetensors"
    assert own.read_text() == "my own"
    assert not (tmp_path / "project/source").exists()


def test_export_to_remote_storage_has_all_chat_templates(
    given: Given, tmp_path: Path
) -> None:
    model, tokenizer = given
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    result = prune(*given, output="memory://api/run")
    assert result.path == "memory://api/run/export/uniform"
    assert sum(p.numel() for p in result.load().parameters()) < model.num_parameters()
    files.download(files.join(result.path, "config.json"), tmp_path / "config.json")
    for name in files.list_files(result.path):
        if "token" in name or "template" in name:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            files.download(files.join(result.path, name), tmp_path / name)
    assert (
        AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    )


def test_prune_accepts_a_path_or_a_spec(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every section of a spec is an argument, the caller's number of threads is kept, and errors
    name remedies in Python.
    """
    sections = set(JobSpec.model_fields) - {"version"}
    assert sections <= set(inspect.signature(ray_surgeon.prune).parameters)
    monkeypatch.chdir(job.folder)
    source = str(job.models["llama"])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = prune(source, memory={"weights": "host"})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert result.uri == str(job.folder / "runs/llama-20pct")
    assert result.report["plan"]["stores"]["weights"] == "host"
    assert type(result.load()).__name__ == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="has no export masked; it has \\['uniform'\\]"):
        result.load("masked")
    with pytest.raises(
        ValueError, match=r"resume=True in Python.*--set output.uri=.*/llama-20pct-2"
    ):
        prune(source, memory={"weights": "host"})
    spec = job.spec(ONE, "spec").read_text()
    found = ray_surgeon.prune(spec=ray_surgeon.parse_spec(spec), progress=False)
    assert_same_shot(job(ONE).uri, Path(found.uri), 1)
    with pytest.raises(ValueError, match="has no export for this"):
        _ = found.path


def test_invalid_arguments_are_reported_once_in_terms_of_the_spec(llama: Path) -> None:
    """Errors name fields of the spec, and no sections that were not given."""
    wrong = {
        "calibration": TEXT | {"strid": 3},
        "pruning": GROUPS | {"target_sparsity": 30},
    }
    with pytest.raises(ValueError, match="is not a valid job spec") as caught:
        prune(str(llama), **wrong)
    first, *lines = str(caught.value).split("\n")
    assert first == "what prune() was given is not a valid job spec:"
    fields = [line.split(":")[0].strip() for line in lines]
    assert fields == ["calibration.strid", "pruning.target_sparsity"]
    with pytest.raises(ValueError, match=r"spec: got a str; give ray_surgeon.parse_spec"):
        ray_surgeon.prune(spec="quickstart.yaml")  # type: ignore[arg-type]
    assert {"prune", "curvature", "JobSpec"} <= set(dir(ray_surgeon))
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = ray_surgeon.prun


def test_invalid_arguments_are_reported_before_a_run_starts(
    given: Given, job: Jobs
) -> None:
    model, tokenizer = given
    folder = (str(job.models["llama"]),)
    spec = ray_surgeon.parse_spec(job.spec().read_text())
    cases: list[tuple[Any, Any, str]] = [
        ((), {}, "model: give a Hub id"),
        ((model,), {}, "needs its tokenizer"),
        ((model.state_dict(),), {}, "gives its source"),
        (({"source": folder[0], "dtyp": "bfloat16"},), {}, "model.dtyp"),
        ((*folder, tokenizer), {}, "belongs to a model in memory"),
        (given, {"spec": spec}, "it says everything already"),
        ((str(job.folder / "absent"),), {}, "no folder"),
        (
            folder,
            {"calibration": ["one text", "another"]},
            "calibration: expected fields, such as",
        ),
        (folder, {"output": 3}, r"output: .*\(got 3\)"),
    ]
    for arguments, sections, message in cases:
        with pytest.raises(ValueError, match=message):
            prune(*arguments, **{"output": str(job.folder / "out"), **sections})
    assert not (job.folder / "out").exists()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_curvature_matches_that_of_a_run(
    family: str, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = runs.in_memory(job.models[family])
    tokens = job.inputs(model=family).calibration
    found = ray_surgeon.curvature(model, tokens)
    cluster = loaded(job.models[family])
    gather_curvature(cluster, tokens)
    ((_, worker),) = cluster.workers.items()
    assert list(found) == list(worker.shard.linears)
    for name, factors in found.items():
        expected = worker.shard.factors(name)
        assert torch.equal(factors.A, expected.A.dense())
        assert torch.equal(factors.G, expected.G.dense())
        assert factors.num_tokens == tokens.size
    gathered = list[str]()
    stop = ModelShard.stop_curvature

    def watch(shard: ModelShard) -> None:
        gathered.extend(name for group in shard.gathering for name in group.names)
        stop(shard)

    monkeypatch.setattr(ModelShard, "stop_curvature", watch)
    name = list(found)[-1]
    alone = ray_surgeon.curvature(model, tokens, linears=[name])
    kind = name.rpartition(".")[2]
    assert {name.rpartition(".")[2] for name in gathered} == {kind}, (
        "other factors would take memory"
    )
    assert list(alone) == [name]
    assert torch.equal(alone[name].G, found[name].G)
    assert not ray_surgeon.curvature(model, tokens, linears=[])
    sampled = ray_surgeon.curvature(model, tokens, linears=[name], label_seed=1)[name]
    assert not torch.equal(sampled.G, found[name].G)
    assert torch.equal(sampled.A, found[name].A)


def test_curvature_of_texts_equals_that_of_their_tokens(
    model_folders: dict[str, Path],
) -> None:
    model, tokenizer = runs.in_memory(model_folders["opt"])
    texts = [
        "The quick brown fox jumps over it.",
        "Another text of another, greater length.",
    ]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    name = next(iter(ModelLayout.of(model.config).shapes))

    def inputs(*given: Any) -> torch.Tensor:
        return ray_surgeon.curvature(model, *given, linears=[name])[name].A

    assert torch.equal(inputs(texts, tokenizer), inputs(tokens))
    with_bos = [[tokenizer.bos_token_id, *sequence] for sequence in tokens]
    assert torch.equal(
        inputs(texts, runs.beginning(tokenizer, "<end> $A")), inputs(with_bos)
    )
    for sequences, options, message in [
        (texts, {}, "texts need one"),
        ([[3]], {}, r"sequences\[0\]: 1 tokens.*takes 2"),
        (None, {}, "give a list"),
        ("one text", {"tokenizer": tokenizer}, "give a list"),
        ([[1, 2, 999]], {}, "from 1 to 999; the model takes .* 0 to 319"),
        ([[1] * 129], {}, "129 tokens .* takes 2 to 128 tokens"),
        (tokens, {"linears": ["absent"]}, "has no absent; it has for example"),
    ]:
        with pytest.raises(ValueError, match=message):
            ray_surgeon.curvature(model, sequences, **options)  # type: ignore[arg-type]


def test_linears_with_and_without_a_bias_have_separate_A() -> None:
    """DeepSeek-V3's query projection never has a bias without low rank; other linears with the same
    input may have one.
    """
    config = runs.config_like("deepseek_v3", q_lora_rank=None, attention_bias=True)
    found = ray_surgeon.curvature(
        AutoModelForCausalLM.from_config(config), [[1, 2, 3, 4]]
    )
    without, has_bias = (
        found[f"model.layers.0.self_attn.{name}"].A
        for name in ("q_proj", "kv_a_proj_with_mqa")
    )
    assert (without.shape, has_bias.shape) == ((32, 32), (33, 33))
    torch.testing.assert_close(has_bias[:32, :32], without)


def test_bidirectional_attention_is_refused() -> None:
    config = runs.config_like("gemma3", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        ModelLayout.of(config)


def test_signal_while_ray_starts_interrupts_the_run(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's signal handler exits with the number of the signal."""
    monkeypatch.setattr(driver, "connect", lambda _: sys.exit(signal.SIGTERM))
    job(cluster__backend="ray", code=130)
    monkeypatch.setattr(driver, "connect", lambda _: sys.exit(3))
    with pytest.raises(SystemExit):
        job(cluster__backend="ray")


def test_long_steps_report_progress(job: Jobs) -> None:
    """Passes report sequences, costs and updates report linears, corrections report steps; each of
    them in order and up to the total.
    """
    options = ONE | LORA | {"calibration__held_aside": 0}
    inputs = job.inputs(options, pruning__costs="greedy", cluster__num_shards=2)
    news: list[object] = []
    directory = RunDirectory(inputs.spec.output.uri)
    run_job(inputs, loaded(job.models["llama"], 2), directory, news.append)
    reports = [one for one in news if isinstance(one, ProgressReport)]
    for step, unit, total in (
        ("curvature", "sequences", 6),
        ("costs", "linears", 28),
        ("update", "linears", 28),
        ("recovery", "steps", 3),
    ):
        own = [m for m in reports if m.step == step and m.unit == unit]
        assert (own[-1].done, own[-1].total) == (total, total), step
        assert len({m.done for m in own}) >= total // 2, step
        assert all(m.shot == 1 for m in own)
    half = next(m for m in reports if m.step == "curvature" and m.done == 3)
    assert half.tokens_each == 40
    assert "tokens/s" in half.pace
    assert "s left" in half.pace


def test_import_of_the_package_loads_no_heavy_dependency() -> None:
    """Help, schema and submit need neither torch nor Ray."""
    script = "import sys, {}; print({{m.partition('.')[0] for m in sys.modules}})"
    for module, packages in (("pipeline", set()), ("run.submit", {"fsspec"})):
        command = [sys.executable, "-c", script.format(f"ray_surgeon.{module}")]
        loaded = ast.literal_eval(subprocess.check_output(command, text=True))
        other = {
            "__main__",
            "_distutils_hack",
            "sitecustomize",
            "__editable___ray_surgeon_finder",
        }
        ours = {name for name in loaded - other if not name.startswith("__editable__")}
        assert ours - sys.stdlib_module_names == {"ray_surgeon", *packages}


def test_subcommands_of_the_command_line(
    job: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = str(job.spec())
    assert pipeline.cli(["schema"]) == 0
    assert '"JobSpec"' in capsys.readouterr().out
    assert pipeline.cli(["plan", spec]) == 0
    assert "1 shard, 1 replica; weights on the device" in capsys.readouterr().out
    on_ray = {"backend": "ray", "num_replicas": 3, "gpus_per_worker": 1}
    detected = {"ray.io/accelerator-type": "H100"}
    on_ray |= {"worker_labels": detected | {"rack": "7", "zone": "!a"}}
    assert pipeline.cli(["plan", str(job.spec(cluster=on_ray)), "--kubernetes"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    (workers,) = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == 3
    assert workers["labels"] == {"rack": "7"}
    pod = workers["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    spec = str(job.spec())
    assert pipeline.cli(["plan", spec, "--kubernetes"]) == 2
    assert "cluster.backend: local has no pods" in capsys.readouterr().err
    for arguments, said in (
        (["prun"], "usage: ray-surgeon"),
        (["prune", spec, "--kubernetes"], "--kubernetes: only for a plan"),
        (
            ["plan", spec, "--kubernetes", "--set", "name=x"],
            "write that into the job spec",
        ),
        (["prune", spec, "--host-memory", "1TB"], "--host-memory: only for a plan"),
        (
            ["plan", spec, "--device", "cpu", "--device-memory", "1GB"],
            "a CPU has the machine's",
        ),
    ):
        with pytest.raises(SystemExit):
            pipeline.cli(arguments)
        assert said in capsys.readouterr().err
    assert not (job.folder / "run").exists()
    assert pipeline.cli(["prune", spec, "--set", "pruning.num_shots=1"]) == 0
    page = job.folder / "c.html"
    drawn = ["--html", str(page), "--plot", str(job.folder / "p.svg")]
    assert pipeline.cli(["report", str(job.folder / "run"), *drawn]) == 0
    assert page.exists()
    capsys.readouterr()
    (program,) = entry_points(group="console_scripts", name="ray-surgeon")
    with pytest.raises(SystemExit):
        program.load()(["--help"])
    said = capsys.readouterr().out
    assert all(command in said for command in ("prune", "plan", "report", "schema"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prune_in_memory", "feed-forward width 64 -> 48"),
        ("look_at_curvature", "sampled G (32, 32)"),
        pytest.param("compare_methods", "Wanda", marks=pytest.mark.slow),
    ],
)
def test_examples_run(
    name: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(str(ROOT))
    runpy.run_module(f"examples.{name}", run_name="__main__")
    assert said in capsys.readouterr().out
