"""The section of a job spec on the curvature of the loss: a union by `kind`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from ray_surgeon.config.base import OrAuto, Positive, Section, by_tag, tag
from ray_surgeon.errors import ConfigError
from ray_surgeon.maths.kronecker import Damping


class DampingSection(Section):
    """Damping of the two factors, relative to the mean of their diagonals."""

    a: float = Field(0.01, ge=0, le=10)
    """Damping of A, the second moment of the inputs"""
    g: float = Field(0.1, ge=0, le=10)
    """Damping of G, the second moment of the output gradients; larger, because few tokens estimate
    G poorly
    """


class _Curvature(Section):
    # factors that a pass over the text gathers
    gathers: ClassVar[Literal["both", "A"]] = "both"
    # whether G is of the loss's gradients, so costs are in nats
    is_of_loss: ClassVar[bool] = False
    # whether F is one Kronecker product, whose inverse greedy paths update
    has_greedy_paths: ClassVar[bool] = True

    @property
    def as_damping(self) -> Damping:
        """The damping in the form that `ray_surgeon.maths` takes."""
        return Damping(0.0, 0.0, 1.0)

    @property
    def chooses_damping(self) -> bool:
        """Whether the damping is chosen on windows held aside."""
        return getattr(self, "damping", None) == "auto"

    @property
    def sequences_backward(self) -> int | None:
        """Number of sequences with a backward pass; None if all have one."""
        return getattr(self, "num_backward", None)

    def label_seed(self, shot: int, num_sequences: int) -> int | None:
        """Return the seed of the labels that are drawn from the model in a shot.

        Args:
            shot: number of the shot.
            num_sequences: sequences of the calibration.

        Returns:
            The seed, or None if the labels come from the data or are not needed.
        """
        return None


class _Damped(_Curvature):
    damping: OrAuto[DampingSection] = DampingSection()
    """Damping of A and G. auto: chosen in every shot: the damping with the least cost of removing a
    part of some linears, measured with factors of the windows held aside
    """
    max_damping: float = Field(1.0, gt=0, le=10)
    """Maximum damping: the damping of a factor that is not positive definite is raised tenfold up
    to this; beyond it the run fails
    """

    @property
    def as_damping(self) -> Damping:
        """The damping in the form that `ray_surgeon.maths` takes; the default if it is auto."""
        damping = DampingSection()
        if self.damping != "auto":
            damping = self.damping
        damping_g = damping.g
        if self.gathers == "A":
            damping_g = 0.0
        return Damping(damping.a, damping_g, self.max_damping)

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between fields."""
        if self.damping != "auto" and self.max_damping < max(
            self.damping.a, self.damping.g
        ):
            yield ConfigError(
                field="max_damping",
                found=(
                    f"{self.max_damping:g} is below damping {self.damping.a:g}/{self.damping.g:g}"
                ),
                remedy="raise it",
            )


class _Fisher(_Damped):
    is_of_loss: ClassVar[bool] = True

    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels of the gradients: the data's (empirical) or drawn from the model (sampled)"""
    seed: int = Field(0, ge=0)
    """Seed of the labels of the sampled Fisher"""

    def label_seed(self, shot: int, num_sequences: int) -> int | None:
        """Return the seed of the labels that are drawn from the model in a shot.

        Args:
            shot: number of the shot.
            num_sequences: sequences of the calibration, each of which has a seed.

        Returns:
            The seed, or None if the labels come from the data.
        """
        if self.fisher == "empirical":
            return None
        return self.seed + shot * num_sequences

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between fields."""
        if self.seed and self.fisher == "empirical":
            yield ConfigError(
                field="seed",
                found="draws labels of the sampled Fisher, and this is the empirical",
                remedy="remove it",
            )


class KfacSection(_Fisher):
    """KFAC: A and G, with activations and gradients treated as independent."""

    kind: Literal["kfac"] = "kfac"
    """A and G of every linear, collected again in every shot"""
    num_backward: Positive | None = None
    """Number of calibration sequences with a backward pass, which give G; they are drawn once.
    null: all. All sequences give A. A pass without gradients takes less than half the time. Groups
    need few sequences with gradients, because the update of their columns uses only A
    """


class ExtendedKfacSection(_Fisher):
    """Extended KFAC: a sum of Kronecker products, the first one KFAC's.

    Source: The LLM Surgeon, section 3.1.
    """

    has_greedy_paths: ClassVar[bool] = False

    kind: Literal["extended_kfac"]
    """A sum of Kronecker products"""
    num_kronecker_terms: int = Field(2, ge=2, le=8)
    """Number of Kronecker products in the sum. Costs obd and updates full and conjugate_gradients
    use all of them; costs obs and update single use the first two
    """
    num_power_iterations: int = Field(4, ge=1, le=100)
    """Power iterations for each further term, updating A and G alternately; each one is a pass over
    the calibration text
    """


class ActivationsSection(_Damped):
    """Only A, from forward passes, with G = I."""

    gathers: ClassVar[Literal["both", "A"]] = "A"

    kind: Literal["activations"]
    """A of every linear, and G = I"""

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between fields."""
        if self.damping != "auto" and self.damping.g != DampingSection().g:
            yield ConfigError(
                field="damping.g",
                found="has no effect, because G is the identity",
                remedy="remove it",
            )


class IdentitySection(_Curvature):
    """A = G = I: costs are magnitudes; no damping is needed."""

    gathers: ClassVar[Literal["both", "A"]] = "A"

    kind: Literal["identity"]
    """A = G = I"""


AnyCurvature = KfacSection | ExtendedKfacSection | ActivationsSection | IdentitySection
CurvatureSection = Annotated[
    Annotated[KfacSection, Tag(tag("kfac"))]
    | Annotated[ExtendedKfacSection, Tag(tag("extended_kfac"))]
    | Annotated[ActivationsSection, Tag(tag("activations"))]
    | Annotated[IdentitySection, Tag(tag("identity"))],
    by_tag(
        lambda get: get("kind", "kfac"), "kind kfac, extended_kfac, activations, identity"
    ),
]
