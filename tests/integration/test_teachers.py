"""Jobs without pruning, which train a model towards a teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ray_surgeon
from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.pipeline import cli, main
from ray_surgeon.preparation.inputs import check
from ray_surgeon.storage import tensor_files
from tests.integration import runs
from tests.integration.runs import Done, Jobs

UNIFORM = {
    "structure": "groups",
    "groups": ["ffn"],
    "allocation": "uniform",
    "num_shots": 1,
}
UNIFORM |= {"target_sparsity": 0.3, "width_multiple": 8}
STREAM = {"source": "python-docs", "max_tokens": 9000}
TRAINING: dict[str, Any] = {
    "rank": 4,
    "num_tokens": 5000,
    "learning_rate": 1e-3,
    "texts": [STREAM],
}
TRAINING |= {"sequences_per_step": 4}

Recover = Callable[..., Done]


@pytest.fixture
def recover(job: Jobs) -> Recover:
    """Return a function that runs a job that trains a model towards a teacher."""

    def recovered(
        model: Path, teacher: Path, folder: str = "recovered", **more: Any
    ) -> Done:
        changes: dict[str, Any] = {"model": str(model), "pruning": None}
        changes["output__exports"] = ["uniform"]
        changes |= {"recovery": TRAINING | {"teacher": {"source": str(teacher)}}}
        changes |= {"calibration__held_aside": 0.5}
        return job(changes | more, folder=folder)

    return recovered


def weaker(model: Path, folder: Path, factor: float = 0.7) -> Path:
    """Write a copy with weakened feed-forward layers."""
    copy = AutoModelForCausalLM.from_pretrained(model)
    for name, parameter in copy.named_parameters():
        if "down_proj" in name:
            parameter.data.mul_(factor)
    shutil.copytree(model, folder)
    copy.save_pretrained(folder)
    return folder


def larger(model: Path, folder: Path, **changes: Any) -> Path:
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "head_dim": 8,
    }
    config = runs.config_like("llama", **sizes, num_key_value_heads=3, **changes)
    return runs.new_model(config, folder, model)


def test_export_is_trained_towards_its_dense_model(
    job: Jobs, llama: Path, recover: Recover
) -> None:
    pruned = job({"pruning": UNIFORM, "output__exports": ["uniform"]})
    done = recover(pruned.export("uniform"), llama)
    assert done.report["dense"]["perplexity"] == pruned.report["dense"]["perplexity"]
    for text, before in pruned.shot["divergence"].items():
        assert done.shot["divergence"][text] < 0.97 * before
    measures = [held["value"] for held in done.shot["recovery_held_aside"]]
    assert measures[-1] < measures[0]
    assert done.shot["sparsity"] == 0
    assert [event["step"] for event in done.events if event["shot"] == 0] == [
        *("plan", "teacher", "evaluation", "load")
    ]
    model, info = AutoModelForCausalLM.from_pretrained(
        done.export("uniform"), output_loading_info=True
    )
    assert not any(info.values())
    before = AutoModelForCausalLM.from_pretrained(pruned.export("uniform"))
    assert model.config.intermediate_size == before.config.intermediate_size < 48
    assert model.num_parameters() == before.num_parameters()
    card = (done.export("uniform") / "README.md").read_text()
    assert f"trained towards {llama.name}," in card


def test_teacher_may_differ_in_widths_and_depth(
    llama: Path, recover: Recover, tmp_path: Path
) -> None:
    """The teacher has its own head. Trainings read a streamed text or calibration windows."""
    teacher = larger(llama, tmp_path / "teacher", tie_word_embeddings=False)
    training = TRAINING | {"teacher": {"source": str(teacher)}, "learning_rate": 1e-2}
    for texts in ([STREAM], []):
        more = {"recovery": training | {"texts": texts}}
        done = recover(llama, teacher, f"{len(texts)}", **more)
        measures = [held["value"] for held in done.shot["recovery_held_aside"]]
        assert measures[-1] < 0.97 * measures[0]
    spec = ray_surgeon.parse_spec((done.uri / "spec.yaml").read_text())
    tokens = torch.from_numpy(check(spec, resume=True).texts["docs"])
    of_teacher, of_model = (
        log_probabilities(f, tokens) for f in (teacher, done.export("uniform"))
    )
    expected = (of_teacher.exp() * (of_teacher - of_model)).sum(dim=-1).mean()
    assert done.shot["divergence"]["docs"] == pytest.approx(float(expected), rel=0.02)
    nll = -of_teacher.gather(2, tokens[:, 1:, None]).mean()
    assert done.report["dense"]["perplexity"]["docs"] == pytest.approx(
        float(nll.exp()), rel=1e-4
    )


def log_probabilities(folder: Path, tokens: Tensor) -> Tensor:
    """Return the log-probabilities [n, T - 1, vocabulary] of a model, by transformers."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    return logits[:, :-1].double().log_softmax(dim=-1)


def test_results_do_not_depend_on_shards_and_replicas(
    llama: Path, recover: Recover, tmp_path: Path
) -> None:
    model = weaker(llama, tmp_path / "weak")
    teacher = larger(llama, tmp_path / "teacher")
    options: dict[str, Any] = {"output__exports": [], "recovery__num_tokens": 1000}
    generation = {"num_prompts": 2, "max_new_tokens": 6}
    texts = [runs.windows("python-docs", name="docs", max_tokens=9000)]
    options["evaluation"] = {"texts": texts, "generation": generation}
    one = recover(model, teacher, "one", **options)
    four = recover(model, teacher, "four", **options, **runs.FOUR)
    dense = [done.report["dense"] for done in (one, four)]
    assert dense[1]["perplexity"] == pytest.approx(dense[0]["perplexity"], rel=1e-4)
    assert dense[1]["generation"]["example"] == dense[0]["generation"]["example"]
    rates = [done.shot["generation"]["acceptance"] for done in (one, four)]
    assert rates[1] == pytest.approx(rates[0], rel=1e-3)
    losses = [done.shot["recovery_losses"] for done in (one, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert four.shot["divergence"] == pytest.approx(one.shot["divergence"], rel=1e-3)


def test_finished_run_rewrites_lost_exports_and_refuses_a_changed_teacher(
    llama: Path, recover: Recover, tmp_path: Path
) -> None:
    """The head of the teacher is saved with its states."""
    teacher = larger(llama, tmp_path / "teacher")
    options = {"recovery__num_tokens": 400}
    first = recover(llama, teacher, **options)
    assert "head" in tensor_files.Reader().names(
        RunDirectory(str(first.uri)).dense_states
    )
    shutil.rmtree(first.export("uniform"))
    spec = tmp_path / "recovered" / "spec.yaml"
    assert main([str(spec), "--resume"]) == 0
    assert (first.export("uniform") / "model.safetensors").exists()
    runs.new_model(runs.config_like("llama"), teacher, llama)
    assert main([str(spec), "--resume"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("pruning=null", "pruning: null leaves nothing to do"),
        ("pruning=null; recovery.rank=2", "add recovery.teacher, or remove it"),
        ("recovery.teacher.source=TEACHER", "recovery.teacher: a job that prunes"),
        (
            "pruning=null; recovery.teacher.source=TEACHER; recovery.loss=cross_entropy",
            "loss cross_entropy needs none",
        ),
        (
            "pruning=null; recovery.teacher.source=TEACHER; curvature.kind=kfac",
            "curvature: pruning.method null",
        ),
        (
            "pruning=null; recovery.teacher.source=TEACHER; output.exports=[per_block]",
            "per_block needs pruning",
        ),
        ("pruning=null; recovery.teacher.source=nowhere/at/all", "recovery.teacher"),
        ("pruning=null; recovery.teacher.source=OTHER", "is not supported"),
        (
            "pruning=null; recovery.teacher.source=SMALLER",
            "vocab_size is 300, and that of",
        ),
        (
            "pruning=null; recovery.teacher.source=RENAMED",
            "1 entries of the tokenizers differ, such as",
        ),
        (
            "pruning=null; recovery.teacher.source=SHORT",
            "sequence_length: 40, but the model takes",
        ),
        (
            "pruning=null; recovery.teacher.source=TEACHER; cluster.num_shards=6",
            "cluster.num_shards",
        ),
    ],
)
def test_unsuitable_teachers_are_refused(
    settings: str, message: str, job: Jobs, llama: Path, tmp_path: Path
) -> None:
    made = {
        "TEACHER": lambda folder: llama,
        "OTHER": lambda folder: runs.copied_model(llama, folder, model_type="bert"),
        "SMALLER": lambda folder: larger(llama, folder, vocab_size=300),
        "RENAMED": lambda folder: renamed(llama, folder),
        "SHORT": lambda folder: larger(llama, folder, max_position_embeddings=32),
    }
    for name, make in made.items():
        if name in settings:
            settings = settings.replace(name, str(make(tmp_path / "teacher")))
    assert message in job.refused(settings)


def renamed(model: Path, folder: Path) -> Path:
    runs.copied_model(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_recover_from_python_and_from_the_command_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = runs.windows("python-docs", 6, max_tokens=9000)
    options: dict[str, Any] = {"calibration": text}
    options["recovery"] = TRAINING | {"num_tokens": 400, "texts": []}
    output = {"uri": str(tmp_path / "run"), "exports": []}
    measured = [runs.windows("python-docs", name="docs", max_tokens=9000)]
    done = ray_surgeon.recover(
        llama, llama, **options, output=output, evaluation=measured, progress=False
    )
    assert done.report["spec"]["pruning"] is None
    assert done.report["spec"]["recovery"]["teacher"]["source"] == str(llama)
    command = [
        "recover",
        str(llama),
        f"--teacher={llama}",
        f"--output={tmp_path / 'other'}",
    ]
    command += [f"--set=calibration={text}", "--set=model.dtype=bfloat16"]
    command += [
        f"--set=evaluation={measured}",
        "--set=recovery.num_tokens=400",
        "--dry-run",
        "--verbose",
    ]
    assert cli(command) == 0
    assert "teacher" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli(["recover", str(llama)])
    with pytest.raises(ValueError, match="model: is the first argument"):
        ray_surgeon.recover(llama, llama, model={"dtype": "bfloat16"})
