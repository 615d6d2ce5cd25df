"""Models that were pruned before, trained towards a teacher: jobs without pruning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ray_surgeon
from ray_surgeon.pipeline import cli
from tests.integration import runs
from tests.integration.runs import Done, Jobs

UNIFORM = {"structure": "groups", "groups": ["ffn"], "allocation": "uniform", "num_shots": 1}
UNIFORM |= {"target_sparsity": 0.3, "width_multiple": 8}
STREAM = {"source": "python-docs", "max_tokens": 9000}
TRAINING: dict[str, Any] = {"rank": 4, "num_tokens": 5000, "learning_rate": 1e-3, "texts": [STREAM]}
TRAINING |= {"sequences_per_step": 4}

Recover = Callable[..., Done]


@pytest.fixture
def recover(job: Jobs) -> Recover:
    """Return what runs a job that trains a model towards a teacher."""

    def recovered(model: Path, teacher: Path, folder: str = "recovered", **more: Any) -> Done:
        changes = {"model": str(model), "pruning": None, "output__exports": ["uniform"]}
        changes |= {"recovery": TRAINING | {"teacher": {"source": str(teacher)}}}
        changes |= {"calibration__held_aside": 0.5}
        return job(changes | more, folder=folder)

    return recovered


def weaker(model: Path, folder: Path, factor: float = 0.7) -> Path:
    """Write a copy whose feed-forward layers give less."""
    copy = AutoModelForCausalLM.from_pretrained(model)
    for name, parameter in copy.named_parameters():
        if "down_proj" in name:
            parameter.data.mul_(factor)
    shutil.copytree(model, folder)
    copy.save_pretrained(folder)
    return folder


def larger(model: Path, folder: Path, **changes: Any) -> Path:
    sizes = {"hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 6, "head_dim": 8}
    config = runs.config_like("llama", **sizes, num_key_value_heads=3, **changes)
    return runs.new_model(config, folder, model)


def test_an_export_is_trained_towards_its_dense_model(
    job: Jobs, llama: Path, recover: Recover
) -> None:
    pruned = job({"pruning": UNIFORM, "output__exports": ["uniform"]})
    done = recover(pruned.export("uniform"), llama)
    assert done.report["dense"]["perplexity"] == pruned.report["dense"]["perplexity"]
    for text, before in pruned.shot["divergence"].items():
        assert done.shot["divergence"][text] < 0.97 * before
    measures = [check["value"] for check in done.shot["recovery_held_aside"]]
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
    assert f"trained towards {llama}" in card


def test_a_teacher_may_have_other_widths_and_another_depth(
    llama: Path, recover: Recover, tmp_path: Path
) -> None:
    """With its own head. The calibration's windows, where it is asked but once."""
    teacher = larger(llama, tmp_path / "teacher", tie_word_embeddings=False)
    training = TRAINING | {"teacher": {"source": str(teacher)}, "texts": []}
    kinds = {"of stream": {}, "of calibration": {"recovery": training}}
    for name, more in kinds.items():
        done = recover(llama, teacher, name, **more, output__exports=[])
        measures = [check["value"] for check in done.shot["recovery_held_aside"]]
        assert measures[-1] < 0.9 * measures[0]
        expected = divergence(teacher, llama, done, "docs")
        text = done.uri.parent / "text.txt"
        assert text.exists()
        assert done.shot["divergence"]["docs"] < expected


def divergence(teacher: Path, model: Path, done: Done, text: str) -> float:
    """Return the divergence before the training, by transformers and in float64."""
    inputs = ray_surgeon.run.inputs.check  # type: ignore[attr-defined]
    spec = ray_surgeon.parse_spec((done.uri / "spec.yaml").read_text())
    tokens = torch.from_numpy(inputs(spec, resume=True).texts[text])
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[:, :-1].double()
            for folder in (teacher, model)
        )
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_shards_and_replicas_change_nothing(llama: Path, recover: Recover, tmp_path: Path) -> None:
    model = weaker(llama, tmp_path / "weak")
    teacher = larger(llama, tmp_path / "teacher")
    options: dict[str, Any] = {"output__exports": [], "evaluation__generation": {"num_prompts": 2}}
    options["evaluation__generation"] |= {"max_new_tokens": 5, "source": str(tmp_path / "p.txt")}
    (tmp_path / "p.txt").write_text("What is a class?\n\nWhat is a list?\n", encoding="utf-8")
    del options["evaluation__generation"]
    one = recover(model, teacher, "one", **options)
    four = recover(model, teacher, "four", **options, **runs.FOUR)
    for part in ("perplexity",):
        assert four.report["dense"][part] == pytest.approx(one.report["dense"][part], rel=1e-4)
    losses = [done.shot["recovery_losses"] for done in (one, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert four.shot["divergence"] == pytest.approx(one.shot["divergence"], rel=1e-3)


def test_a_run_goes_on_with_the_teacher_s_head(
    llama: Path, recover: Recover, job: Jobs, tmp_path: Path
) -> None:
    """Exports that were lost are written again, and another teacher is another run."""
    teacher = larger(llama, tmp_path / "teacher")
    options = {"recovery__num_tokens": 400}
    first = recover(llama, teacher, **options)
    shutil.rmtree(first.export("uniform"))
    spec = tmp_path / "recovered" / "spec.yaml"
    from ray_surgeon.pipeline import main

    assert main([str(spec), "--resume"]) == 0
    assert (first.export("uniform") / "model.safetensors").exists()
    for path in teacher.glob("model.safetensors"):
        path.unlink()
    runs.new_model(runs.config_like("llama"), teacher, llama)
    assert main([str(spec), "--resume"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("pruning=null", "pruning: null leaves nothing to do"),
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
        ("pruning=null; recovery.teacher.source=SMALLER", "vocab_size is 300, and that of"),
        ("pruning=null; recovery.teacher.source=RENAMED", "2 entries of the tokenizers differ"),
        ("pruning=null; recovery.teacher.source=SHORT", "sequence_length: 40, but the model takes"),
        (
            "pruning=null; recovery.teacher.source=TEACHER; cluster.num_shards=6",
            "cluster.num_shards",
        ),
    ],
)
def test_teachers_that_cannot_be(
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
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"\\u0120the":', '"\\u0120xyz":'))
    text = tokenizer.read_text(encoding="utf-8").replace('"Ġthe":', '"Ġxyz":')
    tokenizer.write_text(text, encoding="utf-8")
    return folder


def test_the_command_and_the_function(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = runs.windows("python-docs", 6, max_tokens=9000)
    options = {"calibration": text, "recovery": TRAINING | {"num_tokens": 400, "texts": []}}
    output = {"uri": str(tmp_path / "run"), "exports": []}
    measured = [runs.windows("python-docs", name="docs", split="test")]
    done = ray_surgeon.recover(
        llama, llama, **options, output=output, evaluation=measured, progress=False
    )
    assert done.report["spec"]["pruning"] is None
    assert done.report["spec"]["recovery"]["teacher"]["source"] == str(llama)
    command = ["recover", str(llama), f"--teacher={llama}", f"--output={tmp_path / 'other'}"]
    command += [f"--set=calibration={text}", "--set=model.dtype=bfloat16"]
    command += [f"--set=evaluation={measured}", "--set=recovery.num_tokens=400", "--dry-run"]
    assert cli(command) == 0
    assert "teacher" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli(["recover", str(llama)])
