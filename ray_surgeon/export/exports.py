"""Exports of a run: checks of the job spec, writing, and the stages that write them.

Every export is reloaded in a fresh process. Runs with several sizes export all of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ray_surgeon.config.sections import OutputSection, QuantizeSection, TasksSection
from ray_surgeon.errors import ConfigError
from ray_surgeon.export import folder
from ray_surgeon.export.card import write_card
from ray_surgeon.export.folder import PrunedModel
from ray_surgeon.models import pruned_config
from ray_surgeon.models.attention import for_older_readers
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, WidthLimits
from ray_surgeon.pruning.method import Method
from ray_surgeon.run_state import Facts, RunState, load_weights
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import ModelFiles, open_model

_RELOADED = "reloaded and compared"
_WHOLE = ("masked", "uniform")
"""Exports of a checkpoint with a language model inside that are whole, unless `text_only`."""


def check_exports(
    output: OutputSection, layout: ModelLayout, shrinking: WidthLimits
) -> None:
    """Refuse exports that are impossible for a model, before the run starts.

    Args:
        output: `output` of the job spec.
        layout: layout of the dense model.
        shrinking: widths that pruning may leave.

    Raises:
        ValueError: an export is impossible; the message gives the reason and an alternative.
    """
    if "uniform" in output.exports:
        if not shrinking.same_in_all_blocks:
            raise ConfigError(
                field="output.exports",
                found="uniform needs pruning.allocation uniform, or groups [blocks]",
                remedy="or export per_block",
            )
        pruned_config.check_uniform(layout, tuple(shrinking.fewest))
    if "per_block" in output.exports and not layout.family.has_attention:
        raise ConfigError(
            field="output.exports",
            found=(
                "per_block comes with code for the families of families.yaml, which has no "
                f"{layout.config.model_type}"
            ),
            remedy="export uniform",
        )
    if "masked" in output.exports and "experts" in shrinking.fewest:
        raise ConfigError(
            field="output.exports",
            found="masked keeps all shapes, and routers would go on to choose zeroed experts",
            remedy="export uniform",
        )
    if "gguf" in output.exports:
        from ray_surgeon.export.for_engines import check_gguf

        check_gguf(layout, shrinking)
    if output.quantize is not None:
        from ray_surgeon.export.for_engines import check_quantised

        _check_quantised_experts(layout, output.quantize)
        check_quantised(layout, shrinking, output.quantize)


def check_whole(output: OutputSection, source: ModelFiles) -> None:
    """Refuse `text_only` for a language model, and quantised copies of whole checkpoints.

    Args:
        output: `output` of the job spec.
        source: the model to prune.

    Raises:
        ValueError: names the field, and the remedy.
    """
    if output.text_only and source.whole is None:
        raise ConfigError(
            field="output.text_only",
            found=f"{source.origin} reads text alone",
            remedy="remove it",
        )
    if output.quantize is not None and source.whole is not None and not output.text_only:
        raise ConfigError(
            field="output.quantize",
            found=f"{source.origin} also reads images or sound, and such copies are of text only",
            remedy="set output.text_only to true, or remove quantize",
        )


def _inside_of_whole(
    kind: str, pruned: PrunedModel, output: OutputSection
) -> ModelFiles | None:
    """Return the dense language model if the checkpoint around it is exported, too."""
    source = open_model(pruned.model)
    if source.whole is None or output.text_only or kind not in _WHOLE:
        return None
    return source


def _load_line(kind: str, uri: str, inside: ModelFiles | None) -> str:
    """Return the call that loads an export."""
    if inside is not None:
        return f'AutoModelForImageTextToText.from_pretrained("{uri}")'
    trusts = ", trust_remote_code=True" if kind == "per_block" else ""
    return f'AutoModelForCausalLM.from_pretrained("{uri}"{trusts})'


def _check_quantised_experts(layout: ModelLayout, section: QuantizeSection) -> None:
    if not layout.is_mixture:
        return
    if layout.family.sparse.stacked:
        raise ConfigError(
            field="output.quantize",
            found=(
                f"{layout.config.model_type}'s checkpoints keep experts together, without scales"
            ),
            remedy="remove quantize, or export gguf",
        )
    if not section.is_by_text:
        raise ConfigError(
            field="output.quantize",
            found="transformers loads no quantised mixture, and workers measure what they round",
            remedy="give scheme w4a16 or w8a16, and rounding both_sides or gptq",
        )


def export(
    kind: str,
    pruned: folder.PrunedModel,
    uri: str,
    output: OutputSection,
    tasks: TasksSection | None,
) -> dict[str, Any]:
    """Write an export, reload it in a fresh process, compare and measure it.

    Args:
        kind: one of `output.exports`.
        pruned: the model.
        uri: folder to write.
        output: `output` of the job spec.
        tasks: downstream tasks; None for none.

    Returns:
        The export's entry in the report.

    Raises:
        RuntimeError: the fresh process cannot load the export, or its logits differ.
    """
    layout = pruned.layout
    blocks = list(range(layout.num_blocks))
    widths: list[BlockWidths] = []
    if kind != "masked":
        blocks = pruned.blocks
        widths = pruned_config.block_widths(layout, pruned.rows_kept)
    if kind == "gguf":
        from ray_surgeon.export.for_engines import export_gguf

        return export_gguf(pruned, uri, widths, output.gguf or ("bf16",))
    dense = folder.dense_document(pruned.model)
    inside = _inside_of_whole(kind, pruned, output)
    size_bytes = _write_folder(kind, pruned, uri, dense, blocks, widths, inside)
    entry: dict[str, Any] = {
        "kind": kind,
        "uri": uri,
        "size_bytes": size_bytes,
        "loaders": _loaders(kind, layout, widths),
        "load": _load_line(kind, uri, inside),
        **folder.reload(pruned, uri).entries,
    }
    options = _vllm_options(kind, layout, widths)
    if options is not None:
        entry["serve"] = f"vllm serve {shlex.quote(uri)}{options}"
    if widths:
        entry["widths"] = [[width.num_channels, width.num_kv_heads] for width in widths]
    if len(blocks) < layout.num_blocks:
        entry["blocks"] = blocks
    if layout.num_experts and widths:
        entry["experts"] = [list(width.experts) for width in widths]
    if output.speed is not None and widths:
        from ray_surgeon.export.speed import measure

        entry["speed"] = measure(pruned.cluster, uri, dense, output.speed)
    if tasks is not None:
        from ray_surgeon.export.tasks import evaluate_tasks

        entry["tasks"] = evaluate_tasks(pruned.cluster, uri, tasks)
    return entry


def _write_folder(
    kind: str,
    pruned: folder.PrunedModel,
    uri: str,
    dense: dict[str, Any],
    blocks: Sequence[int],
    widths: Sequence[BlockWidths],
    inside: ModelFiles | None,
) -> int:
    """Write a Hugging Face folder; return the size of its weights in bytes.

    Args:
        kind: one of `output.exports`.
        pruned: the model.
        uri: folder to write.
        dense: config.json of the dense model.
        blocks: numbers of the blocks to write.
        widths: widths of these blocks; empty if the export keeps the dense model's shapes.
        inside: the dense language model, if the checkpoint around it is written, too.
    """
    layout = pruned.layout
    document = dense
    width_of_block: dict[int, BlockWidths] = {}
    if widths:
        document = pruned_config.shallower(layout, dense, blocks)
        width_of_block = dict(zip(blocks, widths, strict=True))
        if kind == "per_block":
            document = pruned_config.per_block_document(layout, document, widths)
        else:
            document = pruned_config.uniform_document(layout, document, widths)
    left_out = pruned_config.left_out(layout, width_of_block)
    size_bytes = folder.write_weights(pruned.cluster, uri, blocks, kind, left_out, inside)
    another_type = document["model_type"] != dense["model_type"]
    folder.copy_small_files(pruned.model, uri, another_type=another_type)
    document = for_older_readers(document)
    if inside is not None:
        document = folder.whole_around(inside, document)
        folder.copy_processor_files(inside, uri)
    files.write_json(files.join(uri, "config.json"), document)
    if kind == "per_block":
        source = folder.shipped_source(layout.config)
        files.write_text(files.join(uri, folder.SHIPPED), source)
    return size_bytes


def _vllm_options(
    kind: str, layout: ModelLayout, widths: Sequence[BlockWidths]
) -> str | None:
    """Return vLLM's options for an export; None if vLLM does not support it or was not tested."""
    if not layout.family.has_attention:
        return None
    if kind == "per_block":
        has_attentions = all(width.num_kv_heads for width in widths)
        is_served = has_attentions and layout.config.model_type != "gpt2"
        # vLLM's transformers backend does not divide logits
        divides_logits = layout.logits_divisor != 1
        if layout.num_experts or divides_logits or not is_served:
            return None
        return " --trust-remote-code"
    if kind == "uniform" and not _is_ordinary_in_vllm(layout, widths):
        return " --model-impl transformers"
    return ""


def _is_ordinary_in_vllm(layout: ModelLayout, widths: Sequence[BlockWidths]) -> bool:
    """Return whether vLLM's class of the family supports the heads of a uniform export."""
    has_all_heads = widths[0].num_kv_heads == layout.heads.num_kv
    return has_all_heads or layout.family.has_free_heads_in_vllm


def _loaders(
    kind: str, layout: ModelLayout, widths: Sequence[BlockWidths]
) -> dict[str, str]:
    """Return a description of how each program loads an export."""
    if kind == "masked":
        return {
            "transformers": _RELOADED,
            "others": "whatever loads the dense model; not run",
        }
    if kind == "uniform":
        if _is_ordinary_in_vllm(layout, widths):
            vllm = "an ordinary configuration of the family"
        else:
            vllm = (
                "with --model-impl transformers; its own class wants heads that fill the "
                "hidden size"
            )
        return {"transformers": _RELOADED, "vLLM": vllm}
    in_transformers = f"{_RELOADED}, generates with a cache"
    if layout.num_experts:
        return {"transformers with trust_remote_code": in_transformers, "vLLM": "not run"}
    if layout.logits_divisor != 1:
        return {
            "transformers with trust_remote_code": in_transformers,
            "vLLM": "no: its transformers backend does not divide the logits",
        }
    return {
        "transformers with trust_remote_code": in_transformers,
        "vLLM with --trust-remote-code": (
            "by its transformers backend, if every block has an attention; not GPT-2"
        ),
    }


@dataclass(frozen=True)
class Size:
    """One of the sizes that a run passes through."""

    shot: int  # the shot after which the model has this size
    value: float | None = None  # as in pruning.sizes; None if there is only one
    is_last: bool = True  # whether it is the size after the last shot

    @property
    def suffix(self) -> str:
        """Suffix of the names of the folders of exports."""
        if self.is_last or self.value is None:
            return ""
        return f"-{self.value:.12g}"


def pruned_of(run: RunState, shot: int) -> PrunedModel:
    """Return the model of a run after a shot, for exports."""
    return PrunedModel(
        cluster=run.cluster,
        layout=run.layout,
        model=run.model,
        facts=run.report.model_card_facts(shot),
        calibration=run.calibration,
        texts=run.texts,
    )


def tell_of(entry: dict[str, Any], run: RunState, facts: Facts, size: Size) -> None:
    """Write an export's model card, and add its entry to the report and to the step's facts."""
    if size.value is not None:
        entry["size"] = size.value
    write_card(entry, run.model, run.report.model_card_facts(size.shot))
    run.report.exports.append(entry)
    for name in ("kind", "uri", "size_bytes", "num_parameters", "reload_error"):
        if name in entry:
            facts[name] = entry[name]
    if "reload_export_rounding" in entry:
        facts["error of rounding"] = entry["reload_export_rounding"]


@dataclass(frozen=True)
class LoadSize:
    """Loads the weights of a smaller size from the commit of its shot."""

    name: ClassVar[str] = "load"  # of its step
    method: Method
    size: Size

    def load(self, run: RunState, facts: Facts) -> None:
        """Load the weights."""
        committed = run.directory.read_shot(self.size.shot).files
        load_weights(run, committed, by_element=self.method.by_element)
        self.method.after_resuming(run.cluster)
        facts["size"] = self.size.value or 0.0


@dataclass(frozen=True)
class Export:
    """Writes one checkpoint, reloads it and measures it."""

    name: ClassVar[str] = "export"  # of its step
    size: Size
    kind: str
    output: OutputSection
    tasks: TasksSection | None

    def write(self, run: RunState, facts: Facts) -> None:
        """Write the checkpoint, reload it in a fresh process, and take the requested measures."""
        run.directory.check_attempt()
        folder = run.directory.path("export", f"{self.kind}{self.size.suffix}")
        entry = export(
            self.kind,
            pruned_of(run, self.size.shot),
            folder,
            output=self.output,
            tasks=self.tasks,
        )
        tell_of(entry, run, facts, self.size)
