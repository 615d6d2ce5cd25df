"""Proves on a tiny copy of a model that its family can be pruned as it is described.

Before a run reads any weights, a copy with random weights is computed in two ways: by the code of
the workers, in two shards, and by transformers alone, from a checkpoint as a run writes it. Both
must agree for the whole copy, and for the copy that has lost a part of its groups: what the workers
set to zero is cut out of the checkpoint, whose configuration has the new widths.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from ray_surgeon.errors import ConfigError
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models import pruned_config
from ray_surgeon.models.attention import for_older_readers
from ray_surgeon.models.build import BUILDING, BlockRange, matrix
from ray_surgeon.models.families import Family
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ExportedTensors, ModelShard
from ray_surgeon.models.tiny_models import NoTinyCopyError, tiny_copy

PAGE = "docs/adding-a-family.md"
"""The page on adding a family, for messages."""

TOLERANCE = 1e-6
"""Largest difference of logits, relative to the largest logit.

Weights are float64, but many families compute norms, softmax and rotary embeddings in float32,
whose numbers have a relative spacing of 1.2e-7. A wrong pairing of rows and columns changes logits
by more than a hundredth.
"""
_EFFECT = 1e-4
"""Least change of the logits, relative to the largest, by groups that are set to zero.

With less, the comparison would show nothing.
"""
_NUM_SEQUENCES = 2
_NUM_TOKENS = 12

Masks = dict[str, StructuredMask]
"""Masks of all linears by their names."""


class NotProvedError(ValueError):
    """A comparison on the tiny copy failed; the message says which, and how."""


@dataclass(frozen=True)
class Proof:
    """What was proved of a model."""

    # kinds of groups that were cut; the others that the job prunes have no configuration of
    # transformers' own that holds a smaller number of them
    kinds: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        """Return e.g. ``proved: attention, ffn in 1.2 s``."""
        proved = ", ".join(self.kinds) or "blocks run one by one"
        return f"proved: {proved} in {self.seconds:.1f} s"


_PROVED: dict[str, Proof] = {}
"""Proofs of this process, by all that they depend on."""


def prove(config: PretrainedConfig, family: Family, kinds: Sequence[str]) -> Proof:
    """Prove that a model's blocks run one by one, and that groups of the given kinds can be cut.

    A process proves the same only once.

    Args:
        config: configuration of the model.
        family: its family.
        kinds: kinds of coupled groups that a job prunes; see `GROUP_KINDS`.

    Raises:
        ConfigError: something is not proved; names what was found, and what was not.
    """
    key = json.dumps([config.to_dict(), repr(family), sorted(kinds)], default=str)
    if key not in _PROVED:
        start = time.monotonic()
        proved = _prove(config, family, kinds)
        _PROVED[key] = Proof(proved, time.monotonic() - start)
    return _PROVED[key]


def _prove(
    config: PretrainedConfig, family: Family, kinds: Sequence[str]
) -> tuple[str, ...]:
    try:
        tiny = tiny_copy(config)
    except NoTinyCopyError as error:
        raise _refusal(config, f"no tiny copy of it can be built: {error}") from error
    try:
        return prove_copy(tiny.config, family, kinds)
    except NotProvedError as error:
        raise _refusal(config, str(error)) from error


def _refusal(config: PretrainedConfig, reason: str) -> ConfigError:
    return ConfigError(
        field="model.source",
        found=f"pruning is not proved to be right for {config.model_type}: {reason}",
        remedy=f"choose another model, or see {PAGE}",
    )


def prove_copy(
    config: PretrainedConfig, family: Family, kinds: Sequence[str]
) -> tuple[str, ...]:
    """Prove the same of a tiny copy; see `prove`.

    Returns:
        The kinds of groups that were cut.

    Raises:
        NotProvedError: a comparison fails.
    """
    with torch.no_grad():
        try:
            copies = _Copies(config, family)
            _check(copies, "its blocks, run one by one, and the whole model", {})
            copies.check_causal()
            return _prove_kinds(copies, kinds)
        except NotProvedError:
            raise
        except Exception as error:  # a family's code may raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise NotProvedError(
                f"its blocks cannot be run one by one: {reason}"
            ) from error


def _prove_kinds(copies: _Copies, kinds: Sequence[str]) -> tuple[str, ...]:
    """Cut groups of all kinds together; if that fails, of each kind alone.

    Raises:
        NotProvedError: names the kinds that cannot be cut, and those that can.
    """
    masks_of: dict[str, Masks] = {}
    for kind in kinds:
        masks = copies.masks_without(kind)
        if masks is not None:
            masks_of[kind] = masks
            effect = copies.effect(masks)
            if not effect > _EFFECT:
                raise NotProvedError(
                    f"without some of its {kind}, logits change by {effect:.1e} of the largest, "
                    f"expected at least {_EFFECT:.0e}"
                )
    if not masks_of:
        return ()
    try:
        _check(copies, "cutting and zeroing", _together(list(masks_of.values())))
    except NotProvedError:
        proved: list[str] = []
        failed: list[str] = []
        for kind, masks in masks_of.items():
            try:
                _check(copies, f"cutting {kind} and zeroing them", masks)
                proved.append(kind)
            except NotProvedError as error:
                failed.append(str(error))
        if proved:
            failed.append(f"proved are {', '.join(proved)}")
        if failed:
            raise NotProvedError("; ".join(failed)) from None
        raise
    return tuple(masks_of)


def _together(masks: Sequence[Masks]) -> Masks:
    """Return masks that remove what any of the given ones removes."""
    result: Masks = {}
    for name, first in masks[0].items():
        rows = first.rows
        columns = first.columns
        for others in masks[1:]:
            rows = rows & others[name].rows
            columns = columns & others[name].columns
        result[name] = StructuredMask(rows, columns)
    return result


def _check(copies: _Copies, what: str, masks: Masks) -> None:
    """Compare the workers' code with transformers.

    Raises:
        NotProvedError: the logits differ, or the checkpoint cannot be loaded.
    """
    try:
        difference = copies.difference(masks)
    except Exception as error:  # a family's code may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise NotProvedError(f"{what}: {reason}") from error
    if not difference <= TOLERANCE:
        raise NotProvedError(
            f"{what} give logits that differ by {difference:.1e} of the largest, "
            f"expected at most {TOLERANCE:.0e}"
        )


class _Copies:
    """A tiny copy in two shards, and its checkpoints.

    Attributes:
        layout: of the copy.
        shards: two, or one of a model with a single block, with random weights.
        tokens: [n, T].
        dense: logits [n, T, vocabulary] of the workers' code, with all groups.
    """

    def __init__(self, config: PretrainedConfig, family: Family) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.layout = ModelLayout.of(config, family=family)
        num_blocks = self.layout.num_blocks
        half = max(num_blocks // 2, 1)
        self.shards = [self._shard(BlockRange(0, half, num_blocks))]
        if half < num_blocks:
            self.shards.append(self._shard(BlockRange(half, num_blocks, num_blocks)))
        self.tokens = torch.randint(
            1,
            config.vocab_size,
            (_NUM_SEQUENCES, _NUM_TOKENS),
            generator=self._generator,
        )
        self.dense = self._logits()

    def _shard(self, blocks: BlockRange) -> ModelShard:
        shard = ModelShard(
            layout=self.layout,
            blocks=blocks,
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
        shard.load(self._read)
        return shard

    def _read(self, name: str) -> Tensor:
        """Return the random values of a tensor; a tied head has those of the embedding."""
        stored = self.layout.tied.get(name, name)
        return random_weight(stored, self.layout.parameters[stored])

    def _logits(self) -> Tensor:
        states = self.tokens
        for shard in self.shards:
            states = torch.cat(BlockRunner(shard).infer(states))
        return self.shards[-1].logits(states)

    def check_causal(self) -> None:
        """Check that the last token changes the last logits only.

        Raises:
            NotProvedError: earlier ones change, too.
        """
        others = self.tokens.clone()
        others[:, -1] -= 1
        shown, self.tokens = self.tokens, others
        changed = self._logits()
        self.tokens = shown
        if _difference(changed[:, :-1], self.dense[:, :-1]) > TOLERANCE:
            raise NotProvedError("its tokens see later ones, unlike the loss")

    def masks_without(self, kind: str) -> Masks | None:
        """Return masks that remove groups of a kind, as many in every block.

        None if no class of transformers holds fewer groups of this kind in every block.
        """
        masks: Masks = {}
        for shape in self.layout.linears:
            masks[shape.name] = StructuredMask.full(shape.num_rows, shape.num_columns)
        if kind == "experts":
            return self._without_experts(masks)
        sparse = self.layout.family.sparse
        of_experts = kind in ("expert_channels", "shared_experts")
        if of_experts and sparse.shared and sparse.shared_width is None:
            return None
        for groups in self.layout.group_sets:
            if groups.kind != kind:
                continue
            num_groups = len(groups.columns)
            num_left = num_groups // 2 + 1
            if kind == "attention":
                num_left = self._num_kv_left()
            if num_left in (0, num_groups):
                return None
            gone = self._permutation(num_groups)[num_left:]
            masks[groups.consumer].columns[groups.columns[gone].flatten()] = False
            for name, rows in groups.producers:
                masks[name].rows[rows[gone].flatten()] = False
        return masks

    def _num_kv_left(self) -> int:
        """Return the largest number of KV heads below all that a class holds, or 0."""
        numbers = pruned_config.kv_heads_left(self.layout, 1, uniform=True)
        smaller = [number for number in numbers if number < self.layout.heads.num_kv]
        return max(smaller, default=0)

    def _without_experts(self, masks: Masks) -> Masks | None:
        """Remove about half of the experts of every mixture."""
        _, num_experts, num_needed = self.layout.wholes["experts"]
        num_left = max(num_needed, num_experts // 2)
        if num_left == num_experts:
            return None
        for experts in self.layout.expert_sets:
            for number in self._permutation(num_experts)[num_left:].tolist():
                for name in experts.linears[number]:
                    masks[name].rows[:] = False
                    masks[name].columns[:] = False
        return masks

    def _permutation(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self._generator)

    @contextlib.contextmanager
    def zeroed(self, masks: Masks) -> Iterator[None]:
        """Context in which the columns that masks remove are zero, and experts are skipped.

        The rows that are removed with these columns keep their weights, because nothing reads their
        outputs.
        """
        before: list[tuple[Tensor, Tensor]] = []
        for shard in self.shards:
            for name, module in shard.linears.items():
                weight = matrix(module)
                columns = masks[name].columns[: weight.shape[1]]
                if not columns.all():
                    before.append((weight, weight.clone()))
                    weight[:, ~columns] = 0
            mixtures = shard.mixtures.values()
            for experts, mixture in zip(shard.expert_sets, mixtures, strict=True):
                mixture.kept = ~experts.removed(masks)
        try:
            yield
        finally:
            for weight, values in before:
                weight.copy_(values)
            for shard in self.shards:
                for mixture in shard.mixtures.values():
                    mixture.kept = torch.ones_like(mixture.kept)

    def effect(self, masks: Masks) -> float:
        """Return by how much logits change if what masks remove is set to zero."""
        with self.zeroed(masks):
            return _difference(self._logits(), self.dense)

    def difference(self, masks: Masks) -> float:
        """Return the difference of logits between zeroing and cutting what masks remove.

        Without masks, of logits between the shards and the model in transformers.
        """
        if not masks:
            return _difference(self._in_transformers(masks), self.dense)
        with self.zeroed(masks):
            return _difference(self._in_transformers(masks), self._logits())

    def _in_transformers(self, masks: Masks) -> Tensor:
        """Return the logits of transformers alone, from a checkpoint without the removed parts."""
        layout = self.layout
        document = layout.config.to_dict()
        blocks = range(layout.num_blocks)
        left_out: list[str] = []
        if masks:
            rows_kept = {name: int(mask.rows.sum()) for name, mask in masks.items()}
            widths = pruned_config.block_widths(layout, rows_kept)
            document = pruned_config.uniform_document(layout, document, widths)
            left_out = pruned_config.left_out(layout, dict(enumerate(widths)))
        tensors: dict[str, Tensor] = {}
        for shard in self.shards:
            groups = [each for each in layout.group_sets if each.block in shard.blocks]
            exported = ExportedTensors(
                shard,
                masks,
                groups,
                blocks=blocks,
                left_out=left_out,
                stored=True,
            )
            names = shard.saved(changed_only=False)
            # those that checkpoints keep together come together
            names.sort(key=layout.family.stored_in)
            tensors.update(exported.tensors(names))
        with tempfile.TemporaryDirectory() as folder:
            config = json.dumps(for_older_readers(document), default=str)
            Path(folder, "config.json").write_text(config, encoding="utf-8")
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(
                contiguous, f"{folder}/model.safetensors", metadata={"format": "pt"}
            )
            return _loaded_logits(folder, self.tokens)


def _loaded_logits(folder: str, tokens: Tensor) -> Tensor:
    """Return the logits float32 of a checkpoint.

    Raises:
        NotProvedError: tensors of the checkpoint do not fit its configuration.
    """
    with BUILDING:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            # holds all values; float64 would be the default of other threads meanwhile
            dtype=torch.float32,
            experts_implementation="eager",  # the others take no float64
            output_loading_info=True,
            local_files_only=True,
        )
    for problem, names in info.items():
        if names:
            example = min(map(str, names))
            raise NotProvedError(f"{problem} in transformers, such as {example}")
    logits: Tensor = model.double().eval()(tokens, use_cache=False).logits
    return logits.float()


def random_weight(name: str, shape: Sequence[int]) -> Tensor:
    """Return random values [*shape] float64 that float32 holds, as some tensors are float32.

    They depend on the name, so that every shard draws the same.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    if len(shape) < 2:
        # norms, biases, and the decays of recurrent layers
        return (0.5 + 0.2 * values).double()
    return (values / math.sqrt(shape[-1])).double()


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest expected value."""
    if not (torch.isfinite(logits).all() and torch.isfinite(expected).all()):
        return math.inf
    return float((logits - expected).abs().max() / expected.abs().max())
