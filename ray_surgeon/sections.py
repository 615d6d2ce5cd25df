"""The sections of a job spec, named after the steps; see `spec.JobSpec`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ray_surgeon.text_sections import Positive, Section


class DampingSection(Section):
    """Damping of the two factors, relative to the mean of their diagonals."""

    a: float = Field(0.01, ge=0, le=10, description="Damping of A, the inputs' second moment")
    g: float = Field(0.1, ge=0, le=10, description="Damping of G, the output gradients' second moment, which few tokens estimate badly")


class CurvatureSection(Section):
    """Curvature of the loss, gathered anew in every shot."""

    kind: Literal["kfac", "activations", "identity"] = Field(
        "kfac", description="kfac: A and G; activations: A alone, G = I; identity: A = G = I, which makes costs magnitudes"
    )
    num_kronecker_terms: int = Field(
        1,
        ge=1,
        le=8,
        description="Kronecker products that are summed to the Fisher of a linear (extended KFAC); each one beyond KFAC's "
        "takes num_power_passes more passes over the calibration text. Updates take all terms, obs costs the first two",
    )
    first_term: Literal["kfac", "nearest"] = Field(
        "kfac",
        description="kfac: G and A as if gradients and activations were independent; nearest: the Kronecker product nearest to the "
        "Fisher, by num_power_passes more passes",
    )
    num_power_passes: int = Field(4, ge=1, le=100, description="Passes of the power method for each term it finds, for A and G in turns")
    fisher: Literal["empirical", "sampled"] = Field(
        "empirical", description="Labels of the gradients: the data's (empirical) or drawn from the model (sampled)"
    )
    seed: int = Field(0, ge=0, description="Seed of the labels of the sampled Fisher")
    damping: DampingSection = Field(DampingSection(), description="Damping of A and G")
    max_damping: float = Field(
        1.0, gt=0, le=10, description="A factor that is not positive definite gets ten times the damping, up to this; then the run fails"
    )

    @property
    def takes_power_passes(self) -> bool:
        """Whether the power method has terms to find."""
        return self.num_kronecker_terms > 1 or self.first_term == "nearest"

    @model_validator(mode="after")
    def _cap_above_damping(self) -> CurvatureSection:
        if self.max_damping < max(self.damping.a, self.damping.g):
            raise ValueError(f"max_damping {self.max_damping:g} is below damping {self.damping.a:g}/{self.damping.g:g}; raise it")
        return self


class SpeedSection(Section):
    """A request that is timed: a batch of prompts read at once (prefill), then new tokens one by one (decode)."""

    batch_size: Positive = Field(1, description="Prompts at once")
    prompt_length: int = Field(512, gt=1, description="Tokens of each prompt")
    num_new_tokens: int = Field(32, gt=1, description="Tokens to generate after it")
    num_repeats: Positive = Field(5, description="Measurements of each model, or each width, taken in turns")
    num_threads: Positive = Field(1, description="torch threads, on the CPU")


class TargetSection(Section):
    """What the whole model may need in the end; one of the four."""

    parameters: Positive | None = Field(None, description="Parameters of the whole model, embeddings included, tied ones once")
    bytes: Positive | None = Field(None, description="Bytes of its weights, in the dtype of the job")
    flops: Positive | None = Field(
        None, description="Floating-point operations for a token of a prompt of request.prompt_length tokens, on average over it"
    )
    latency_s: float | None = Field(
        None, gt=0, description="Seconds to answer a request, as the sum over blocks of times that are measured once a width at the start"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where latencies are measured: on the first worker's machine, or its GPU")
    request: SpeedSection = Field(SpeedSection(), description="The request whose latency is meant")

    @property
    def unit(self) -> str:
        """Which of the four is given."""
        return next(name for name in ("parameters", "bytes", "flops", "latency_s") if getattr(self, name) is not None)

    @property
    def allowed(self) -> float:
        """What may be needed."""
        return float(getattr(self, self.unit))

    @model_validator(mode="after")
    def _one_unit(self) -> TargetSection:
        given = [name for name in ("parameters", "bytes", "flops", "latency_s") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"target: give one of parameters, bytes, flops and latency_s, got {', '.join(given) or 'none'}")
        idle = {"parameters": ("device", "request"), "bytes": ("device", "request"), "flops": ("device",)}
        for name in idle.get(given[0], ()):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"target: {name} has no effect on {given[0]}; remove it")
        if given == ["flops"] and self.request != SpeedSection(prompt_length=self.request.prompt_length):
            raise ValueError("target: flops takes only prompt_length of request; remove the rest")
        return self


class PruningSection(Section):
    """What is removed, how much, and in how many shots."""

    method: Literal["llm_surgeon", "sparsegpt", "wanda"] = Field(
        "llm_surgeon",
        description="llm_surgeon: one global threshold on costs, and updates; sparsegpt and wanda, for elements and n_m: block after "
        "block to the same sparsity, each on the inputs that the blocks pruned before give it",
    )
    structure: Literal["groups", "rows_columns", "rows", "columns", "element", "n_m"] = Field(
        "rows_columns",
        description="What may be removed; groups: FFN channels and KV groups with all that belongs to them, so that the model can really "
        "be made smaller; n_m removes from groups of inputs of a row, see n_m",
    )
    groups: tuple[Literal["ffn", "attention"], ...] = Field(
        ("ffn", "attention"), min_length=1, description="Kinds of structure groups: FFN channels, KV groups with their query heads"
    )
    allocation: Literal["global", "uniform"] = Field(
        "global",
        description="Of structure groups. global: one threshold over the model, widths differ from block to block; uniform: the same "
        "widths in every block, which plain model classes can hold",
    )
    width_multiple: Positive = Field(
        64, description="In the end every feed-forward layer has a multiple of this many channels, or all it had; hardware likes multiples"
    )
    remove_blocks: bool = Field(
        False, description="With allocation global, whether the last KV group or the last channels of a block may go too"
    )
    n_m: tuple[Positive, Positive] = Field((2, 4), description="[N, M] of structure n_m: N of M consecutive inputs of a row stay")
    target_sparsity: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the parameters of the blocks' linears to remove, biases included"
    )
    target: TargetSection | None = Field(
        None, description="Of structure groups, in place of target_sparsity: what the whole model may need in the end"
    )
    num_shots: int = Field(5, ge=1, le=1000, description="Shots, each with a curvature of its own")
    schedule: Literal["linear", "geometric"] = Field(
        "linear",
        description="linear: every shot removes (or saves) the same; geometric: every shot keeps the same fraction, later ones remove less",
    )
    sparsities: tuple[float, ...] | None = Field(
        None, description="Sparsity at the end of every shot, in place of num_shots and schedule; the last one is target_sparsity"
    )
    costs: Literal["obs", "obd"] = Field(
        "obs", description="Predicted loss increase of a removal if the other weights make up for it (obs) or stay as they are (obd)"
    )
    group_costs: Literal["joint", "sum"] = Field(
        "joint", description="Cost of an N:M group: the exact joint cost of its best pattern, or the sum of its smallest single costs"
    )
    selection: Literal["once", "greedy"] | None = Field(
        None,
        description="Costs of rows and columns: each as if it went alone (once), or after all cheaper ones of its linear went (greedy). "
        "Without it, greedy wherever it can be: with obs costs and one Kronecker term",
    )
    rank_by: Literal["cost", "cost_per_parameter"] = Field(
        "cost_per_parameter",
        description="What the global threshold compares: the cost of a structure, or its cost per parameter removed (of groups: per "
        "unit of what target names)",
    )

    @property
    def fewest_groups(self) -> dict[str, int]:
        """Groups of each kind that stay in every block."""
        return {"ffn": 0, "attention": 0} if self.remove_blocks else {"ffn": self.width_multiple, "attention": 1}

    @property
    def shots(self) -> int:
        """Number of shots."""
        return self.num_shots if self.sparsities is None else len(self.sparsities)

    @property
    def targets(self) -> tuple[float, ...]:
        """Sparsity at the end of every shot; without target_sparsity there is none."""
        return () if self.target_sparsity is None else self.fractions(self.target_sparsity)

    @property
    def allowed(self) -> float | None:
        """What the whole model may need in the end, in the unit of `target`; None if a sparsity is the target."""
        return None if self.target is None else self.target.allowed

    def fractions(self, last: float) -> tuple[float, ...]:
        """Return the fraction that is gone at the end of every shot, if `last` is that of the last one."""
        if self.sparsities is not None:
            return self.sparsities
        parts = [shot / self.num_shots for shot in range(1, self.num_shots + 1)]
        if self.schedule == "geometric":
            return tuple(1 - (1 - last) ** part for part in parts)
        return tuple(last * part for part in parts)

    @model_validator(mode="after")
    def _one_target(self) -> PruningSection:
        if (self.target_sparsity is None) == (self.target is None):
            got = "none" if self.target is None else "both"
            raise ValueError(f"target_sparsity: give this or target, got {got}")
        if self.target is not None and self.structure != "groups":
            raise ValueError(f"target: structure {self.structure} leaves zeros, which save nothing; set structure groups")
        if self.target is not None and self.sparsities is not None:
            raise ValueError("sparsities: are fractions of the linears' parameters, not of target; use num_shots and schedule")
        return self

    @model_validator(mode="after")
    def _rising_sparsities(self) -> PruningSection:
        if self.sparsities is not None:
            rising = all(a < b for a, b in zip((0.0, *self.sparsities), self.sparsities, strict=False))
            if not rising or self.sparsities[-1:] != (self.target_sparsity,):
                raise ValueError(f"sparsities: {self.sparsities} must rise from above 0 to target_sparsity {self.target_sparsity}")
            if self.model_fields_set & {"num_shots", "schedule"}:
                raise ValueError("sparsities: takes the place of num_shots and schedule; remove those")
        return self

    @model_validator(mode="after")
    def _possible_pattern(self) -> PruningSection:
        n, m = self.n_m
        if not n < m <= 16:
            raise ValueError(f"n_m: [{n}, {m}] needs N < M <= 16; give for example [2, 4] or [4, 8]")
        if self.structure == "n_m" and self.target_sparsity is not None and self.target_sparsity > 1 - n / m:
            raise ValueError(f"target_sparsity: {self.target_sparsity:g} is more than {n}:{m} can remove, {1 - n / m:g}; lower it")
        return self


class UpdatesSection(Section):
    """How the weights that stay make up for those that go."""

    correlations: Literal["full", "single", "none"] = Field(
        "full", description="Updates of all removals together, of each as if it went alone, or none (OBD)"
    )
    solver: Literal["conjugate_gradients", "chunks"] = Field(
        "conjugate_gradients",
        description="For elements and n_m with full correlations: all at once by preconditioned conjugate gradients, or chunk by chunk "
        "as the paper does",
    )
    precision: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="dtype of the products in conjugate gradients; bfloat16 is faster where the hardware has it"
    )
    num_iterations: Positive = Field(16, description="Iterations of conjugate gradients, at most")
    tolerance: float = Field(1e-3, ge=0, lt=1, description="Relative residual at which conjugate gradients stop")
    max_correlate: Positive = Field(2000, description="Elements in a chunk")
    joint: Literal["exact", "independent"] = Field(
        "independent",
        description="When rows and columns go together: exact minimises the quadratic; independent adds both corrections of the "
        "original weights, as the published code does",
    )
    first_order_step: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Step of the first-order correction in closed form, which also follows the gradient of the loss: 1 minimises the "
        "quadratic with its gradient, 0 leaves the gradient out",
    )


class CorrectionSection(Section):
    """Low-rank first-order corrections: after every shot, B A is trained beside every linear of the blocks and absorbed into it."""

    lora_rank: int = Field(0, ge=0, le=1024, description="Rank of B A; 0 for no corrections")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Of Adam")
    steps_per_shot: int = Field(3, ge=0, description="Steps of Adam after every shot")
    sequences_per_step: Positive = Field(1, description="Calibration sequences of one step, at most all")
    final_epochs: int = Field(0, ge=0, description="Passes over the calibration sequences after the last shot")
    seed: int = Field(0, ge=0, description="Seed of A at the start, and of the order of the sequences")

    @model_validator(mode="after")
    def _trains(self) -> CorrectionSection:
        if self.lora_rank and not self.steps_per_shot and not self.final_epochs:
            raise ValueError("lora_rank is set, but steps_per_shot and final_epochs are 0; set one of them")
        if not self.lora_rank and self.model_fields_set - {"lora_rank"} and self != CorrectionSection():
            raise ValueError("lora_rank is 0, so there are no corrections; set it, for instance to 8, or remove the other fields")
        return self


class RetriesSection(Section):
    """How often a run goes on from its last committed shot after a loss, by cause; 0 for never. Errors of the input are not retried."""

    worker: int = Field(3, ge=0, description="A worker's process ended or does not answer any more")
    node: int = Field(10, ge=0, description="A machine went away, as spot machines do")
    coordinator: int = Field(3, ge=0, description="The coordinator's process ended or does not answer any more")
    communication: int = Field(3, ge=0, description="A collective between replicas failed or took longer than step_timeout_s")
    memory: int = Field(1, ge=0, description="Ray ended a worker because its machine ran out of memory")


class ClusterSection(Section):
    """Workers and where they run."""

    backend: Literal["ray", "local"] = Field(
        "ray", description="Workers as Ray actors, or all in this process, for debugging; the results are equal"
    )
    address: str | None = Field(
        None, description="Ray address, e.g. auto, host:6379 or ray://host:10001; without it RAY_ADDRESS, and without that a Ray of its own"
    )
    num_shards: Positive = Field(1, description="Pieces the blocks are cut into, one worker each")
    num_replicas: Positive = Field(1, description="Copies of all shards; each sees its share of the sequences")
    cpus_per_worker: Positive = Field(1, description="CPUs of a worker, which is also its number of torch threads")
    gpus_per_worker: Literal[0, 1] = Field(0, description="1 puts every worker on a GPU of its own (backend local: all on one)")
    start_timeout_s: float = Field(300.0, gt=0, description="How long to wait for the cluster to have room for all workers")
    step_timeout_s: float = Field(1800.0, gt=0, description="A collective between replicas that takes longer fails")
    ping_timeout_s: float = Field(60.0, gt=0, description="A process that does not answer for so long counts as lost; for backend ray")
    retries: RetriesSection = Field(RetriesSection(), description="What happens after a loss; for backend ray")


class OutputSection(Section):
    """Where results go."""

    uri: str = Field(min_length=1, description="Run directory: a local path or an fsspec URI such as s3://bucket/runs/name")
    keep_shots: int = Field(
        2, ge=0, description="Keep the tensors of this many last shots; 0 keeps all. What is recorded of a shot is always kept"
    )
    exports: tuple[Literal["masked", "uniform", "per_block", "deci"], ...] = Field(
        ("masked",),
        description="Checkpoints to write at the end. masked: dense with zeros; of structure groups also uniform: really smaller, for "
        "plain classes; per_block: really smaller, widths differ, with modeling code beside the weights; deci: likewise, as DeciLM",
    )
    speed: SpeedSection | None = Field(None, description="Measure how fast each smaller export is beside the dense model")

    @model_validator(mode="after")
    def _each_export_once(self) -> OutputSection:
        if len(set(self.exports)) < len(self.exports):
            raise ValueError(f"exports: {list(self.exports)} names one twice; remove it")
        if self.speed is not None and not set(self.exports) - {"masked"}:
            raise ValueError("speed: exports has no smaller model to measure; add uniform, per_block or deci, or remove speed")
        return self
