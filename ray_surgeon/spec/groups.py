"""The section `pruning` of coupled groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.width_limits import WidthLimits
from ray_surgeon.spec.base import Positive
from ray_surgeon.spec.curvature import AnyCurvature
from ray_surgeon.spec.depth import Deepened
from ray_surgeon.spec.reconstruction import Reconstructed
from ray_surgeon.spec.schedule import FamilySection, ScheduleSection
from ray_surgeon.spec.targets import FlopsTarget, TimedTarget

GroupKind = Literal[
    "ffn",
    "attention",
    "shared_experts",
    "expert_channels",
    "experts",
    "blocks",
    "attention_layers",
    "ffn_layers",
]

CHANNELS = {"ffn", "shared_experts", "expert_channels"}
"""Kinds of groups that are channels, of which a width is left."""


ExpertCosts = Literal["rerouting", "reap", "frequency", "random"]


def _default_groups(section: Mapping[str, Any]) -> tuple[GroupKind, ...]:
    # at equal speed of decoding, heads lose more than channels
    return ("ffn",) if isinstance(section.get("target"), TimedTarget) else ("ffn", "attention")


class CoupledSection(Reconstructed, Deepened, FamilySection):
    """What both ways to allocate coupled groups have."""

    uniform: ClassVar[bool] = False  # whether every block gets the same widths

    structure: Literal["groups"]
    """Coupled groups"""
    method: Literal["llm_surgeon"] = "llm_surgeon"
    """The LLM Surgeon: costs from the curvature, and updates"""
    groups: tuple[GroupKind, ...] = Field(default_factory=_default_groups, min_length=1)
    """Kinds of groups; ffn and attention if not given, ffn alone where target is a speed: ffn,
    channels of feed-forward layers; attention, KV groups with their query heads; in mixtures of
    experts also shared_experts, their channels; expert_channels, those of every expert; experts,
    whole ones. Whole layers: blocks; attention_layers and ffn_layers, their parts, which leave
    blocks that differ. A kind that the model does not have is refused: attention of OLMoE and
    DeepSeek-V3, ffn where every block has experts. With allocation uniform, attention takes nothing
    from OPT, GPT-2, Qwen2-MoE and a Phi-3 with longrope, whose classes hold no fewer heads, and
    from models of one KV head
    """
    expert_costs: ExpertCosts = "rerouting"
    """What a whole expert costs: rerouting, the loss increase that gradients predict if its tokens
    go to the next ones; or a score of a baseline, which has no such unit: reap, weight times norm
    of its output; frequency, its share of tokens; random
    """
    tensor_parallel: Positive = 1
    """Number of devices over which an engine will split every layer; remaining heads and channels
    can be split so
    """
    width_multiple: Positive | None = None
    """At the end, the number of channels of every feed-forward layer and expert is a multiple of
    this, or the original number. Without effect where groups names no channels. null: for every
    device of tensor_parallel 64; 128 if output.quantize is set
    """
    target_sparsity: float | None = Field(None, gt=0, lt=1)
    """Fraction of the parameters of the blocks' linears to remove, biases included"""

    @property
    def fewest_groups(self) -> dict[str, int]:
        """Groups of each kind to prune that stay in every block; see `budgets.fewest_left`."""
        fewest = dict.fromkeys(CHANNELS, self.multiple) | {"attention": 1}
        return {str(kind): fewest.get(kind, 0) for kind in self.narrow_kinds}

    @property
    def multiple(self) -> int:
        """The number that widths are multiples of in the end."""
        return self.width_multiple or 64 * self.tensor_parallel

    def shrinking(self, fewest: Mapping[str, int]) -> WidthLimits:
        """Return what pruning may leave if so many groups of each kind stay."""
        return WidthLimits(
            fewest, self.multiple, self.tensor_parallel, self.uniform, self.layer_kinds
        )

    def goal(self, dense: float, shot: int) -> float:
        """Return what the model may need of a budget after a shot, of which it needs `dense`."""
        if self.target is None:
            return dense * (1 - self.targets[shot - 1])
        wanted = [self.target.of(size) for size in self.sizes or (self.target.value,)]
        ends = [1 - target.allowed(dense) / dense for target in wanted]
        return dense * (1 - self.through(ends)[shot - 1])

    def check_target(self, least: float, dense: float, unit: str) -> None:
        """Refuse a target that cannot be reached, or that the dense model meets already.

        Args:
            least: what a model needs of which everything is removed that may be.
            dense: what the dense model needs.
            unit: of both.

        Raises:
            OutOfReachError: says what is possible.
        """
        if self.target is None:
            assert self.last_sparsity is not None
            allowed = dense * (1 - self.last_sparsity)
            name = "sizes" if self.sizes else "target_sparsity"
            what = f"pruning.{name}: {self.last_sparsity:g}"
        else:
            allowed = self.target.allowed(dense)
            first = self.target.of(self.sizes[0]) if self.sizes else self.target
            what = f"pruning.target: {first.unit} {first.value:.6g}"
            if first.allowed(dense) >= dense:
                need = f"the dense model needs no more than {dense:.6g} {unit}"
                need += first.named(dense, dense)
                raise OutOfReachError(f"{what}, but {need}; ask for a smaller or faster model")
            what = f"pruning.target: {self.target.unit} {self.target.value:.6g}"
            unit += self.target.named(least, dense) if least else ""
        if allowed < least:
            how = f"these groups and allocation, and a width_multiple which is {self.multiple}"
            need = f"the model needs at least {least:.6g} {unit}"
            most = f"at most {1 - least / dense:.4f} of that can be removed"
            remedy = "ask for less to go, or change those"
            raise OutOfReachError(f"{what}, but with {how}, {need}, so {most}; {remedy}")

    def problem_with(self, curvature: AnyCurvature) -> str | None:
        """Return why this section and a curvature do not go together; see `ScheduleSection`."""
        reasons = {"extended_kfac": "does not go with structure groups; use kfac"}
        if "experts" in self.groups:
            reasons["identity"] = "looks at no text, which says what whole experts cost; use kfac"
            if self.expert_costs == "rerouting":
                reasons["activations"] = "has no gradients, which whole experts need; use kfac"
        if curvature.kind in reasons:
            return f"curvature.kind: {curvature.kind} {reasons[curvature.kind]}"
        if set(self.groups) == {"experts"}:
            changed = curvature.model_dump(exclude_defaults=True).keys()
            for field in sorted(changed & {"damping", "max_damping"}):
                return f"curvature.{field}: costs of whole experts invert no factor; leave it out"
        return super().problem_with(curvature)

    def problems(self) -> Iterator[str]:
        """Yield what fields have against each other."""
        kinds = set(self.groups)
        if len(kinds) < len(self.groups):
            yield f"groups: {', '.join(self.groups)} name a kind twice; remove one"
        if self.expert_costs != "rerouting" and kinds != {"experts"}:
            problem = "is of whole experts alone and has another unit; set groups to [experts]"
            yield f"expert_costs: {self.expert_costs} {problem}"
        if self.uniform and (parts := kinds & {"attention_layers", "ffn_layers"}):
            remedy = "set allocation to global, or name blocks"
            yield f"groups: {', '.join(sorted(parts))} leave blocks that differ; {remedy}"
        if self.multiple % self.tensor_parallel:
            devices = f"tensor_parallel {self.tensor_parallel}; give a multiple of it"
            yield f"width_multiple: {self.multiple} channels cannot be split over {devices}"
        named = [name for name in ("target_sparsity", "target", "sizes") if getattr(self, name)]
        if len(named) != 1 and named != ["target", "sizes"]:
            got = " and ".join(named) or "none"
            yield f"target_sparsity: give this, sizes or target, got {got}"


class GroupsSection(CoupledSection):
    """Coupled groups, as many from each block as one threshold over the model says."""

    allocation: Literal["global"] = "global"
    """One threshold over the model; widths differ from block to block"""


class UniformGroupsSection(CoupledSection):
    """Coupled groups, the same number from each block.

    Plain model classes can hold the result.
    """

    uniform: ClassVar[bool] = True

    allocation: Literal["uniform"]
    """The same widths in every block"""


def problems_of_mixture(
    layout: ModelLayout, pruning: ScheduleSection, curvature: AnyCurvature | None
) -> Iterator[str]:
    """Yield why a mixture cannot be pruned so, with the remedy; nothing for other models."""
    if not layout.is_mixture:
        return
    if curvature is not None and curvature.sequences_backward is not None:
        yield "curvature.num_backward: the experts of a mixture see too few tokens; remove it"
    if not isinstance(pruning, CoupledSection):
        return
    if isinstance(pruning.target, TimedTarget):
        unit = pruning.target.unit
        yield f"pruning.target: {unit}, a latency, is not for mixtures; give parameters or bytes"
    if "experts" not in pruning.groups:
        return
    field = layout.family.sparse.num_groups
    num_groups = getattr(layout.config, field) if field else None
    if num_groups is not None and num_groups > 1:
        problem = f"the router chooses among {num_groups} groups of experts of one size"
        yield f"pruning.groups: {problem} ({field}), so no single one can go; use expert_channels"
    if isinstance(pruning.target, FlopsTarget):
        yield "pruning.target: whole experts save no flops; give parameters or bytes"
