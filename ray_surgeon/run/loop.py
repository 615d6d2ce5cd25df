"""The page that says what a run is: load, measure, prune shot by shot, export.

Knows workers and a method, not Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ray_surgeon.export.for_engines import export_quantised
from ray_surgeon.export.kinds import export
from ray_surgeon.export.latency import Widths, latency_budget
from ray_surgeon.export.tasks import evaluate_tasks
from ray_surgeon.plan.plan import DoesNotFitError, Plan
from ray_surgeon.plan.room import device_of, look_around, shared
from ray_surgeon.report.directory import RunDirectory, TakenOverError
from ray_surgeon.report.events import Event, Fact, Moment, Steps
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.report.record import RunReport
from ray_surgeon.run.inputs import Inputs
from ray_surgeon.runtime.cluster import Cluster, LostError
from ray_surgeon.runtime.dense_model import CALIBRATION, read_states, write_states
from ray_surgeon.runtime.passes import Measured, measure, remember
from ray_surgeon.runtime.saving import continue_from_shot, save_shot
from ray_surgeon.runtime.worker import ModelRecipe, clean_up, load
from ray_surgeon.spec.targets import LatencyTarget
from ray_surgeon.stages.answers.answers import (
    Answers,
    answers_of,
    dense_record,
    measure_answers,
    measure_rates,
    read_answers,
    remember_answers,
    shot_record,
    write_answers,
)
from ray_surgeon.stages.answers.prompts import Yardstick
from ray_surgeon.stages.calibration import HELD
from ray_surgeon.stages.correction import held_measure
from ray_surgeon.stages.prune import Choice, Corrections, Groups
from ray_surgeon.stages.prune.experts import go_around_removed
from ray_surgeon.stages.search import SEARCHED, Search
from ray_surgeon.stages.self_text.conversations import as_tensors, from_tensors, write
from ray_surgeon.storage import files, tensor_files

_PAUSE_S = 5.0
"""Between two looks at memory that is to become free."""


class CollapseError(RuntimeError):
    """The model is worse than the spec allows."""


def run_shots(
    inputs: Inputs,
    workers: Cluster,
    run: RunDirectory,
    listen: Callable[[Event | Moment], None],
    *,
    patience_s: float = 0.0,
) -> None:
    """Prune the model shot by shot; every shot is committed.

    A run continues after the last committed shot.

    What workers have on their disks is removed at the end, and after errors of the work.

    Args:
        inputs: checked.
        workers: without weights.
        run: a run directory that was checked for these inputs.
        listen: is called with the event of every step, and with moments inside of long ones.
        patience_s: how long to wait for memory that is taken, as by workers of an earlier try that
            are about to end.

    Raises:
        DoesNotFitError: the workers' memory is too small, whatever is kept where; nothing has
            started then.
        TakenOverError: another try of this run has begun meanwhile.
        FloatingPointError: a loss, factor or cost is not usable; committed shots stay.
        CollapseError: perplexity is above the limit of the spec; committed shots stay.
    """
    try:
        _run_shots(inputs, workers, run, listen, patience_s)
    except BaseException as error:
        told = _last_words(run, error)
        if isinstance(told, Exception) and not isinstance(told, LostError):
            with contextlib.suppress(Exception):
                workers.clean_up()
        if told is error:
            raise
        raise told from error
    workers.run_all(clean_up)


def _last_words(run: RunDirectory, error: BaseException) -> BaseException:
    """Write the events of a run that failed, and return the error to tell.

    Nothing is written if another try has the folder.
    """
    with contextlib.suppress(
        Exception
    ):  # whatever a store's client raises; the first error is the one to tell
        try:
            run.check_attempt()
            run.write_events()
        except TakenOverError as taken:
            if isinstance(error, Exception):  # what failed may be what the other try has taken away
                return taken
    return error


def _run_shots(
    inputs: Inputs,
    workers: Cluster,
    run: RunDirectory,
    listen: Callable[[Event | Moment], None],
    patience_s: float,
) -> None:
    spec = inputs.spec
    method = inputs.method
    num_shots = inputs.spec.pruning.shots
    scratch = spec.memory.scratch, _key(run.uri), uuid.uuid4().hex
    plan = _plan(inputs, workers, scratch, time.monotonic() + patience_s)
    workers.stores = plan.stores
    run.start(inputs.spec_yaml, inputs.fingerprints)
    done = [run.read_shot(index) for index in run.committed_indices()]
    report = RunReport(
        spec.model_dump(mode="json"),
        inputs.fingerprints,
        inputs.environment,
        inputs.layout.num_parameters,
    )
    report.shots.extend(shot.record for shot in done)
    report.retries.extend(run.retries())
    report.plan = plan.as_record()
    step = Steps(workers, run, num_shots, listen)
    workers.progress.listener = lambda: listen(step.moment())
    page = LivePage(run)
    lowers_divergence = spec.correction is not None and spec.correction.loss == "kl"

    with step("plan") as facts:
        facts |= asdict(plan.stores) | {
            "peak_gib": max(max(peaks) for peaks in plan.peaks().values()) / 2**30
        }
    with step("load", len(done)) as facts:
        shot_files = (
            tuple((key, file.uri) for file in done[-1].files for key in file.keys) if done else ()
        )
        recipe = ModelRecipe(inputs.model, shot_files, scratch)
        workers.run_all(load, recipe, method.by_element, workers.stores)
        if isinstance(method, Groups) and done:
            workers.run_all(go_around_removed)
        facts |= {"workers": len(workers.placement.workers), "resumed_after_shot": len(done)}
    if isinstance(method, Groups) and method.budget is None:
        with step("latency") as facts:
            method = _with_latencies(method, inputs, workers, run.path("latency.json"))
            facts["dense_s"] = method.known_budget.dense
    if inputs.written:
        with step("sampling") as facts:
            inputs = _with_written(
                workers, inputs, run.path("written.safetensors"), facts, resumed=bool(done)
            )
    text = inputs.text
    given = method
    if done:
        report.dense = done[-1].record["dense"]
        workers.run_all(read_states, run.dense_states)
    answers = None
    if inputs.yardstick is not None:
        with step("answers") as facts:
            answers = _answers(
                inputs.yardstick, workers, run.path("answers.json"), resumed=bool(done)
            )
            facts |= {"prompts": len(answers.prompts), "num_tokens": answers.num_tokens}
    if not done:
        report.dense = _look_at_dense(
            inputs, workers, step, calibration=lowers_divergence and not method.has_costs
        )
        if answers is not None and inputs.yardstick is not None:
            report.dense["generation"] = dense_record(answers, inputs.yardstick.text_of)

    for shot in range(len(done) + 1, num_shots + 1):
        step.new_shot()
        method = given
        scores = None
        choice = Choice(None, {})
        record = dict[str, Any]()
        if method.has_costs:
            with step("curvature", shot) as facts:
                calibrated = method.calibrate(
                    workers, text, shot, remembers=lowers_divergence and shot == 1
                )
                method = calibrated.method
                record = calibrated.record
                facts |= {"calibration_loss": calibrated.loss, "num_tokens": text.tokens.size}
                if (chosen := record.get("damping_chosen")) is not None:
                    facts["damping"] = f"{chosen['a']:g}/{chosen['g']:g}"
                record["calibration_loss"] = calibrated.loss
            with step("costs", shot) as facts:
                scores = method.score(workers, shot)
                facts["damping_raised"] = len(scores.raised_damping)
            if (search := Search.of(method)) is not None:
                with step("search", shot) as facts:
                    scores, record["search"] = search.run(
                        workers, scores, inputs.searched, text, shot
                    )
                    facts |= search.facts(record["search"])
            with step("threshold", shot) as facts:
                choice = method.choose(workers, scores, shot)
                facts |= choice.facts
        with step("update", shot) as facts:
            linears = method.of_loss(method.apply(workers, text.tokens, choice, shot))
            sparsity = 1 - sum(s.num_kept for s in linears) / sum(s.size for s in linears)
            record |= method.record(workers, scores, choice, linears)
            predicted = record.get("predicted_loss_increase")
            facts |= {"sparsity": sparsity} | (
                {} if predicted is None else {"predicted_loss_increase": predicted}
            )
            facts |= method.update_facts(record)
            if len(text.held) > 0 and method.has_costs:
                record["divergence_held_aside"] = facts["divergence held aside"] = held_measure(
                    workers, text
                )
            if answers is not None and spec.correction is not None:  # what corrections begin from
                rates = measure_rates(workers, answers)
                record["generation_before_correction"] = asdict(rates)
                facts["accepted"] = rates.acceptance
        if spec.correction is not None:
            with step("correction", shot) as facts:
                trained = Corrections(spec.correction).train(
                    workers, text, shot, num_shots, record.get("divergence_held_aside")
                )
                facts |= trained.facts
                record |= trained.as_record()
        with step("evaluation", shot) as facts:
            facts["sparsity"] = sparsity
            measured = _measure(workers, inputs, facts)
            if answers is not None and inputs.yardstick is not None:
                generation = measure_answers(
                    workers, answers, inputs.yardstick.section.max_new_tokens
                )
                record["generation"] = shot_record(answers, generation, inputs.yardstick.text_of)
                facts |= {"accepted": generation.acceptance, "agreement": generation.agreement}
        _check_for_collapse(measured, report.dense["perplexity"], spec.evaluation.stop_above, shot)
        with step("commit", shot) as facts:
            run.check_attempt()  # what follows takes files away that another try may have written
            if shot == 1:  # what a run that goes on reads
                workers.run_all(write_states, run.dense_states)
            files.remove_files(
                run.shot_folder(shot), ["*.safetensors"]
            )  # of a try that was interrupted
            written = [
                file
                for worker in workers.run_all(save_shot, run.shot_folder(shot))
                for file in worker
            ]
            report.add_shot(
                shot,
                inputs.spec.pruning.targets,
                sparsity,
                choice.threshold,
                measured,
                linears,
                record,
                step,
            )
            run.commit_shot(shot, written, report.shots[-1])
            workers.run_all(continue_from_shot, written)
            run.write_report(report.as_record())
            page.draw(report.as_record(), final=False)
            if spec.output.keep_shots:
                run.drop_tensors(shot - spec.output.keep_shots)
            last = report.shots[-1]
            facts |= {
                "uri": run.shot_folder(shot),
                "parameters": last["num_nonzero"],
                "peak_rss_bytes": last["peak_rss_bytes"],
            }
        run.write_events()  # with the commit's own

    _write_exports(inputs, workers, run, report, step)
    page.draw(report.as_record(), final=True)
    run.write_report(report.as_record())  # last: a run whose report is whole has ended


def _plan(
    inputs: Inputs, workers: Cluster, scratch: tuple[str | None, str, str], until_s: float
) -> Plan:
    """Return how the job runs in the memory that there is.

    If it does not fit, more is waited for until a time.
    """
    while True:
        machines = workers.run_all(look_around, *scratch)
        try:
            return inputs.plan(
                shared(machines), device_of(machines, inputs.spec.cluster.cpus_per_worker)
            )
        except DoesNotFitError:
            if time.monotonic() >= until_s:
                raise
        time.sleep(_PAUSE_S)


def _look_at_dense(
    inputs: Inputs, workers: Cluster, step: Steps, *, calibration: bool
) -> dict[str, Any]:
    """Measure the dense model, keep its states, and return its record."""
    with step("evaluation") as facts:
        record: dict[str, Any] = {"perplexity": _remember(workers, inputs, facts)}
        text = inputs.text
        if calibration:
            remember(workers, CALIBRATION, text.tokens, text.counts)
        if len(inputs.searched):
            remember(workers, SEARCHED, inputs.searched)
        if len(text.held):
            remember(workers, HELD, text.held, text.held_counts)
            facts["windows held aside"] = len(text.held)
    if inputs.spec.evaluation.tasks is not None:
        with step("tasks"):
            record["tasks"] = evaluate_tasks(workers, inputs.model, inputs.spec.evaluation.tasks)
    return record


def _write_exports(
    inputs: Inputs, workers: Cluster, run: RunDirectory, report: RunReport, step: Steps
) -> None:
    spec = inputs.spec
    num_shots = inputs.spec.pruning.shots
    run.write_report(report.as_record())  # without those of an earlier try, which are written anew
    for kind in spec.output.exports:
        with step("export", num_shots) as facts:
            run.check_attempt()
            found = export(
                kind,
                workers,
                inputs.layout,
                inputs.model,
                run.path("export", kind),
                inputs.calibration[0],
                report.model_card_facts(),
                report.shots[-1]["linears"],
                output=spec.output,
                tasks=spec.evaluation.tasks,
            )
            report.exports.append(found)
            facts |= {
                name: found[name]
                for name in ("kind", "uri", "size_bytes", "reload_max_logit_difference")
                if name in found
            }
    if (
        spec.output.quantize is not None
    ):  # after the other exports, because it may round the workers' weights
        with step("quantise", num_shots) as facts:
            (uniform,) = (entry for entry in report.exports if entry["kind"] == "uniform")
            copy = export_quantised(
                workers,
                inputs.layout,
                inputs.model,
                uniform,
                inputs.calibration,
                inputs.texts,
                report.model_card_facts(),
                spec.output.quantize,
            )
            report.exports.append(copy)
            facts |= {name: copy[name] for name in ("kind", "uri", "size_bytes")}


def _with_latencies(method: Groups, inputs: Inputs, workers: Cluster, uri: str) -> Groups:
    section = method.section
    assert isinstance(section.target, LatencyTarget)
    widths = Widths(method.fewest, section.multiple, section.tensor_parallel, section.uniform)
    return method.with_budget(
        latency_budget(workers, inputs.layout, inputs.model, section.target, widths, uri)
    )


def _with_written(
    workers: Cluster, inputs: Inputs, uri: str, facts: dict[str, Fact], *, resumed: bool
) -> Inputs:
    """Let the dense model write its part of the calibration, unless an earlier try did."""
    if files.exists(uri):
        texts = from_tensors(tensor_files.read(uri))
    elif resumed:
        raise ValueError(
            f"{uri} is gone, and the dense model with it, which wrote it; put it back, or start a "
            "new run"
        )
    else:
        texts = {number: write(workers, request) for number, request in inputs.written.items()}
        tensor_files.write(uri, as_tensors(texts))
    facts["num_sequences"] = sum(len(text.tokens) for text in texts.values())
    if any(text.answers.any() for text in texts.values()):
        facts["share of answers"] = float(
            np.concatenate([text.answers for text in texts.values()]).mean()
        )
    return inputs.with_written(texts)


def _answers(yardstick: Yardstick, workers: Cluster, uri: str, *, resumed: bool) -> Answers:
    """Let the dense model answer the prompts, unless an earlier try of the run did."""
    if files.exists(uri):
        answers = read_answers(uri)
        if not resumed:  # otherwise its states are among those of the dense model
            remember_answers(workers, answers)
        return answers
    if resumed:
        raise ValueError(
            f"{uri} is gone, and the dense model with it, whose answers it had; put it back, or "
            "start a new run"
        )
    answers = answers_of(
        workers, yardstick.asked(workers), yardstick.section.max_new_tokens, yardstick.ends
    )
    write_answers(uri, answers)
    return answers


def _remember(workers: Cluster, inputs: Inputs, facts: dict[str, Fact]) -> dict[str, float]:
    """Return the dense model's perplexities, and keep what later weights are compared with."""
    found = {name: remember(workers, name, windows) for name, windows in inputs.texts.items()}
    facts |= {f"perplexity {name}": value for name, value in found.items()}
    return found


def _measure(workers: Cluster, inputs: Inputs, facts: dict[str, Fact]) -> dict[str, Measured]:
    found = {name: measure(workers, name, windows) for name, windows in inputs.texts.items()}
    facts |= {f"perplexity {name}": value.perplexity for name, value in found.items()}
    facts |= {f"divergence {name}": value.divergence for name, value in found.items()}
    return found


def _check_for_collapse(
    after: Mapping[str, Measured], before: Mapping[str, float], limit: float | None, shot: int
) -> None:
    if limit is None:
        return
    for text, value in ((text, measured.perplexity) for text, measured in after.items()):
        if not value <= limit * before[text]:
            raise CollapseError(
                f"after shot {shot} the perplexity on {text} is {value:.4g}, "
                f"{value / before[text]:.3g} times the dense model's; evaluation.stop_above allows "
                f"{limit:g}. The shots before are committed; prune less, or raise "
                "evaluation.stop_above"
            )


def _key(uri: str) -> str:
    """Return a name for a run's folder of scratch, the same for every try."""
    return hashlib.sha256(uri.encode()).hexdigest()[:16]
