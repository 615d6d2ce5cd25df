"""The section `pruning` of coupled groups, with its parts `depth` and `reconstruction`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from ray_surgeon.config.base import Fraction, Positive, Section
from ray_surgeon.config.curvature import AnyCurvature
from ray_surgeon.config.schedule import (
    FamilySection,
    FlopsTarget,
    ScheduleSection,
    TargetSection,
    TimedTarget,
)
from ray_surgeon.errors import ConfigError
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.layers import LAYER_KINDS
from ray_surgeon.models.layout import FEED_FORWARD_OF_ALL, ModelLayout
from ray_surgeon.models.pruned_config import WidthLimits

LayerCosts = Literal["divergence", "loss", "influence", "last", "random"]
MEASURED = {"divergence", "loss"}
"""Costs that are measured again after every removal."""


class DepthSection(Section):
    """Choice of the removed layers, and the update that compensates for them."""

    is_checked: ClassVar[bool] = True

    costs: LayerCosts = "divergence"
    """Cost of removing a layer, on windows held aside. divergence: from the dense model with the
    layer off, measured again after every removal. Scores of baselines: loss: the loss with the
    layer off, measured in the same way (SLEB); influence: the angle between hidden states before
    and after a block (ShortGPT); last: the last layers first; random
    """
    num_removed: Positive | None = None
    """Number of layers to remove over all shots. Required if groups also contains kinds that are
    parts of layers; those then provide the rest of the target. null, if groups contains only
    layers: as many layers as the target needs
    """
    update: bool = True
    """Whether the linear before a removed layer learns the layer's contribution to the residual
    stream, as a linear function of its own inputs; undone if the windows held aside get worse
    """


class ReconstructionSection(Section):
    """Reconstruction of feed-forward layers, see `ray_surgeon.recovery.reconstruction`."""

    is_checked: ClassVar[bool] = True

    learning_rate: float | None = Field(None, gt=0, le=1)
    """Adam's largest learning rate, relative to the root mean square of each weight; after a short
    warm-up it falls linearly to zero. null: the best of three rates on the windows held aside,
    tried on two layers
    """
    tokens_per_step: Positive = 512
    """Calibration tokens per step; limited by the number of all tokens"""
    num_epochs: Positive = 2
    """Passes over the calibration tokens"""
    seed: int = Field(0, ge=0)
    """Seed of the order of the tokens"""


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
"""Kinds of groups that are channels of feed-forward layers."""

ExpertCosts = Literal["rerouting", "reap", "frequency", "random"]


def _default_groups(section: Mapping[str, Any]) -> tuple[GroupKind, ...]:
    # at equal speed of decoding, removing heads harms the model more than removing channels
    if isinstance(section.get("target"), TimedTarget):
        return ("ffn",)
    return ("ffn", "attention")


class CoupledSection(FamilySection):
    """Fields of both allocations of coupled groups."""

    uniform: ClassVar[bool] = False  # whether every block gets the same widths

    groups: tuple[GroupKind, ...] = Field(default_factory=_default_groups, min_length=1)
    """Kinds of groups. ffn: channels of feed-forward layers; attention: KV groups with their query
    heads; in mixtures of experts also shared_experts: channels of the shared experts;
    expert_channels: channels of every expert; experts: whole experts. Whole layers: blocks; or
    attention_layers and ffn_layers, parts of blocks, after which blocks differ. If not given: ffn
    and attention, or ffn alone if target is a speed. A kind that the model does not have is
    refused: attention for OLMoE and DeepSeek-V3, ffn if every block has experts. With allocation
    uniform, attention prunes nothing in OPT, GPT-2, Qwen2-MoE and a Phi-3 with longrope, because
    their classes support no smaller number of heads, or in models with one KV head
    """
    depth: DepthSection | None = None
    """Removal of whole layers, before the channels and heads of the same shot, if groups contains
    blocks, attention_layers or ffn_layers; null: the defaults
    """
    reconstruction: ReconstructionSection | None = None
    """In every shot, after the update: train every narrowed feed-forward layer to reproduce its
    earlier outputs. Workers keep its inputs until then. null: no reconstruction
    """
    structure: Literal["groups"]
    """Coupled groups"""
    method: Literal["llm_surgeon"] = "llm_surgeon"
    """The LLM Surgeon: costs from the curvature, and updates"""
    expert_costs: ExpertCosts = "rerouting"
    """Cost of a whole expert. rerouting: the loss increase predicted from gradients if its tokens
    go to the next experts. Scores of baselines, in other units: reap: router weight times norm of
    the output; frequency: share of the tokens; random
    """
    tensor_parallel: Positive = 1
    """Number of devices over which an engine will split every layer; the remaining heads and
    channels can be split over them
    """
    width_multiple: Positive | None = None
    """The final number of channels of every feed-forward layer and expert is a multiple of this, or
    the original number. Has no effect if groups contains no channels. null: 64 per device of
    tensor_parallel; 128 if output.quantize is set
    """
    target_sparsity: Fraction | None = None
    """Fraction of the parameters of the blocks' linears to remove, biases included: 0.3 or 30%"""

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Kinds of layers that may be removed whole."""
        return tuple(kind for kind in LAYER_KINDS if kind in self.groups)

    @property
    def narrow_kinds(self) -> tuple[str, ...]:
        """Kinds of groups that are parts of layers."""
        return tuple(kind for kind in self.groups if kind not in LAYER_KINDS)

    @property
    def takes_curvature(self) -> bool:
        """Whether parts of layers are pruned; the removal of whole layers takes no curvature."""
        return bool(self.narrow_kinds)

    @property
    def checks_itself(self) -> bool:
        """Whether windows held aside are needed, for a stage or for the choice of layers."""
        return super().checks_itself or bool(self.layer_kinds)

    @property
    def fewest_groups(self) -> dict[str, int]:
        """Kind of groups -> groups that stay in every block; see `budgets.fewest_left`."""
        fewest = {}
        for kind in self.narrow_kinds:
            if kind in CHANNELS:
                fewest[kind] = self.multiple
            elif kind == "attention":
                fewest[kind] = 1
            else:
                fewest[kind] = 0
        return fewest

    @property
    def multiple(self) -> int:
        """The divisor of all final widths."""
        return self.width_multiple or 64 * self.tensor_parallel

    def shrinking(self, fewest: Mapping[str, int]) -> WidthLimits:
        """Return the limits of the widths.

        Args:
            fewest: kind of groups -> groups that stay in every block.
        """
        return WidthLimits(
            fewest=fewest,
            multiple=self.multiple,
            tensor_parallel=self.tensor_parallel,
            uniform=self.uniform,
            layers=self.layer_kinds,
        )

    def goal(self, dense: float, shot: int) -> float:
        """Return the budget of the model after a shot.

        Args:
            dense: need of the dense model, in the unit of the budget.
            shot: number of the shot, from 1.
        """
        if self.target is None:
            return dense * (1 - self.targets[shot - 1])
        values = self.sizes or (self.target.value,)
        ends = [1 - self.target.of(value).allowed(dense) / dense for value in values]
        return dense * (1 - self.through(ends)[shot - 1])

    def check_target(self, least: float, dense: float, unit: str) -> None:
        """Raise if a target cannot be reached, or if the dense model already meets it.

        Args:
            least: need of the smallest allowed model.
            dense: need of the dense model.
            unit: unit of both.

        Raises:
            OutOfReachError: the target is out of reach; the message gives the smallest possible
                value.
        """
        if self.target is None:
            assert self.last_sparsity is not None
            allowed = dense * (1 - self.last_sparsity)
            field = "sizes" if self.sizes else "target_sparsity"
            goal = f"{field}: {self.last_sparsity:g}"
        else:
            self._check_first_target(self.target, dense, unit)
            allowed = self.target.allowed(dense)
            goal = f"target: {self.target.unit} {self.target.value:.6g}"
            if least:
                unit += self.target.named(least, dense)
        if allowed < least:
            raise OutOfReachError(
                f"pruning.{goal}, but with these groups and allocation, and a width_multiple "
                f"which is {self.multiple}, the model needs at least {least:.6g} {unit}, so at "
                f"most {1 - least / dense:.4f} of that can be removed; ask for less to go, or "
                "change those"
            )

    def _check_first_target(self, target: TargetSection, dense: float, unit: str) -> None:
        first = target.of(self.sizes[0]) if self.sizes else target
        if first.allowed(dense) >= dense:
            raise OutOfReachError(
                f"pruning.target: {first.unit} {first.value:.6g}, but the dense model needs no "
                f"more than {dense:.6g} {unit}{first.named(dense, dense)}; ask for a smaller or "
                "faster model"
            )

    def problem_with(self, curvature: AnyCurvature) -> ConfigError | None:
        """Return the conflict between this section and a curvature, if there is one."""
        kind = curvature.kind
        if kind == "extended_kfac":
            return ConfigError(
                field="curvature.kind",
                found="extended_kfac does not go with structure groups",
                remedy="use kfac",
            )
        if "experts" in self.groups and kind == "identity":
            return ConfigError(
                field="curvature.kind",
                found="identity looks at no text, but costs of whole experts need one",
                remedy="use kfac",
            )
        needs_gradients = "experts" in self.groups and self.expert_costs == "rerouting"
        if needs_gradients and kind == "activations":
            return ConfigError(
                field="curvature.kind",
                found="activations has no gradients, which whole experts need",
                remedy="use kfac",
            )
        if set(self.groups) == {"experts"}:
            changed = curvature.model_dump(exclude_defaults=True)
            for field in ("damping", "max_damping"):
                if field in changed:
                    return ConfigError(
                        field=f"curvature.{field}",
                        found="costs of whole experts invert no factor",
                        remedy="leave it out",
                    )
        if self.reconstruction is not None and kind == "identity":
            return ConfigError(
                field="curvature.kind",
                found="identity keeps no inputs of layers",
                remedy="use kfac or activations",
            )
        return None

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between fields."""
        yield from self._problems_of_depth()
        if self.reconstruction is not None and FEED_FORWARD_OF_ALL.isdisjoint(
            self.groups
        ):
            kinds = " or ".join(sorted(FEED_FORWARD_OF_ALL))
            yield ConfigError(
                field="reconstruction",
                found="is of channels",
                remedy=f"add {kinds} to groups, or leave it out",
            )
        yield from self._problems_of_groups()
        if self.multiple % self.tensor_parallel:
            yield ConfigError(
                field="width_multiple",
                found=(
                    f"{self.multiple} channels cannot be split over tensor_parallel "
                    f"{self.tensor_parallel}"
                ),
                remedy="give a multiple of it",
            )
        goals = {
            "target_sparsity": self.target_sparsity,
            "target": self.target,
            "sizes": self.sizes,
        }
        given = [name for name, value in goals.items() if value]
        if len(given) != 1 and given != ["target", "sizes"]:
            got = " and ".join(given) or "none"
            yield ConfigError(
                field="target_sparsity",
                found=f"got {got} of target_sparsity, sizes and target",
                remedy="give one of them",
            )

    def _problems_of_depth(self) -> Iterator[ConfigError]:
        if not self.layer_kinds:
            if self.depth is not None:
                kinds = ", ".join(LAYER_KINDS)
                yield ConfigError(
                    field="depth",
                    found="is of whole layers",
                    remedy=f"remove it, or name one of {kinds} in groups",
                )
            return
        depth = self.depth or DepthSection()
        if self.narrow_kinds and depth.num_removed is None:
            kinds = ", ".join(self.narrow_kinds)
            yield ConfigError(
                field="depth.num_removed",
                found=f"groups names {kinds} beside layers",
                remedy="say how many layers go first",
            )
        if not self.narrow_kinds and depth.num_removed is not None:
            kinds = ", ".join(self.layer_kinds)
            yield ConfigError(
                field="depth.num_removed",
                found=f"the target says how many {kinds} go",
                remedy="remove it",
            )
        if depth.costs == "influence" and self.layer_kinds != ("blocks",):
            yield ConfigError(
                field="depth.costs",
                found="influence is defined for blocks only",
                remedy="set groups to [blocks], or use divergence",
            )

    def _problems_of_groups(self) -> Iterator[ConfigError]:
        kinds = set(self.groups)
        if len(kinds) < len(self.groups):
            yield ConfigError(
                field="groups",
                found=f"{', '.join(self.groups)} name a kind twice",
                remedy="remove one",
            )
        if self.expert_costs != "rerouting" and kinds != {"experts"}:
            yield ConfigError(
                field="expert_costs",
                found=(
                    f"{self.expert_costs} is of whole experts alone and has another unit"
                ),
                remedy="set groups to [experts]",
            )
        parts = kinds & {"attention_layers", "ffn_layers"}
        if self.uniform and parts:
            yield ConfigError(
                field="groups",
                found=f"{', '.join(sorted(parts))} leave blocks that differ",
                remedy="set allocation to global, or name blocks",
            )


class GroupsSection(CoupledSection):
    """Coupled groups, selected from all blocks by one threshold over the model."""

    allocation: Literal["global"] = "global"
    """One threshold over the model; widths differ from block to block"""


class UniformGroupsSection(CoupledSection):
    """Coupled groups, the same number from every block.

    Plain model classes can hold the result.
    """

    uniform: ClassVar[bool] = True

    allocation: Literal["uniform"]
    """The same widths in every block"""


def problems_of_mixture(
    layout: ModelLayout, pruning: ScheduleSection, curvature: AnyCurvature | None
) -> Iterator[ConfigError]:
    """Yield conflicts between a job and a mixture of experts; none for other models."""
    if not layout.is_mixture:
        return
    if curvature is not None and curvature.sequences_backward is not None:
        yield ConfigError(
            field="curvature.num_backward",
            found="the experts of a mixture see too few tokens",
            remedy="remove it",
        )
    if not isinstance(pruning, CoupledSection):
        return
    if isinstance(pruning.target, TimedTarget):
        unit = pruning.target.unit
        yield ConfigError(
            field="pruning.target",
            found=f"{unit}, a latency, is not for mixtures",
            remedy="give parameters or bytes",
        )
    if "experts" not in pruning.groups:
        return
    field = layout.family.sparse.num_groups
    num_groups = None
    if field:
        num_groups = getattr(layout.config, field)
    if num_groups is not None and num_groups > 1:
        yield ConfigError(
            field="pruning.groups",
            found=(
                f"the router chooses among {num_groups} groups of experts of one size "
                f"({field}), so no single one can go"
            ),
            remedy="use expert_channels",
        )
    if isinstance(pruning.target, FlopsTarget):
        yield ConfigError(
            field="pruning.target",
            found="whole experts save no flops",
            remedy="give parameters or bytes",
        )
