"""Loss at the head, in slices of tokens; the logits of a whole sequence are never stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ray_surgeon.maths.products import product

TOKENS_PER_SLICE = 128
"""Tokens whose logits exist at once: 128 tokens x 50k vocabulary x 4 bytes = 25 MiB."""
TOKENS_IN_CACHE = 8
"""Tokens that a CPU processes together, so that their probabilities stay in a core's cache.

A GPU processes a whole slice together.
"""


def bytes_at_the_head(vocab_size: int, width: int, *, on_cpu: bool) -> int:
    """Return the peak memory of a loss in bytes, beside the hidden states.

    It holds the logits of a slice (of two models, except on CPUs) and float32 copies of the logits
    of the tokens that are processed together.

    Args:
        vocab_size: vocabulary size of the model.
        width: bytes of a logit.
        on_cpu: whether a CPU computes the loss, in parts that fit its cache. The C library's heap
            then holds the same amount again, as measured.
    """
    if on_cpu:
        num_tokens = 2 * TOKENS_IN_CACHE
        num_logits = TOKENS_PER_SLICE
    else:
        num_tokens = TOKENS_PER_SLICE
        num_logits = 2 * TOKENS_PER_SLICE
    return vocab_size * (num_logits * width + num_tokens * 20)


def perplexity_of(mean: float) -> float:
    """Return the exponential of a mean NLL in nats; infinity if it overflows.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    if math.isnan(mean):
        raise FloatingPointError(
            "the loss on the evaluation text is not a number; check the weights"
        )
    if mean >= 700:
        return math.inf
    return math.exp(mean)


_Work = Callable[[slice, Sequence[Tensor]], None]


class Predicted:
    """The predicted tokens: position t predicts token t + 1, so T - 1 in each sequence."""

    def __init__(
        self,
        tokens: Tensor,
        counts: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Find the labels, and draw random numbers for sampled labels if a generator is given.

        Args:
            tokens: [num_sequences, T] int64.
            counts: [num_sequences, T] bool, whether each token counts as a prediction: the loss at
                position t counts if token t + 1 does. None if all count. Positions that do not
                count have no logits, no loss and a gradient of 0.
            generator: generator on the CPU. If given, the labels of the gradient are drawn from the
                model (sampled Fisher) instead of the data. They are the same on every device, and
                do not depend on which tokens count.
        """
        self._shape = tokens[:, 1:].shape
        self._places: Tensor | None = None
        if counts is not None:
            self._places = counts[:, 1:].reshape(-1).nonzero()[:, 0]
        self.labels = self.chosen(tokens[:, 1:, None])  # [n, 1]
        # [n] in [0, 1), the random numbers by which labels are drawn
        self.chances: Tensor | None = None
        if generator is not None:
            chances = torch.rand(self._shape.numel(), generator=generator)
            self.chances = self.chosen(chances.to(tokens.device)[:, None])[:, 0]

    def chosen(self, rows: Tensor) -> Tensor:
        """Return the rows [n, d] of [num_sequences, T - 1, d] whose predictions count."""
        flat = rows.reshape(-1, rows.shape[-1])
        if self._places is None:
            return flat
        return flat[self._places]

    def placed(self, rows: Tensor) -> Tensor:
        """Return rows [n, ...] as [num_sequences, T - 1, ...], zero where nothing counts."""
        if self._places is not None:
            of_all = rows.new_zeros(self._shape.numel(), *rows.shape[1:])
            rows = of_all.index_copy_(0, self._places, rows)
        return rows.view(*self._shape, *rows.shape[1:])

    def work_on(
        self, hidden: list[Tensor], heads: list[Tensor], work: _Work, with_gradient: bool
    ) -> Tensor | None:
        """Call ``work(span, logits)`` for parts of the predictions that count.

        Args:
            hidden: input of the head [num_sequences, T, d] of each model; each gives logits
                [len(span), vocabulary].
            heads: one weight [vocabulary, d] of all models, or a list of one weight per model.
            work: if a gradient is wanted, it overwrites the first model's logits with their
                gradient.
            with_gradient: whether to return the gradient.

        Returns:
            Gradient at the first model's hidden states [num_sequences, T, d], or None.
        """
        states = [self.chosen(of_model[:, :-1]) for of_model in hidden]
        first = states[0]
        gradient: Tensor | None = None
        if with_gradient:
            gradient = torch.empty_like(first)
        num_tokens = TOKENS_PER_SLICE
        size = TOKENS_PER_SLICE
        if first.device.type == "cpu":
            # the C library reuses one block of memory from slice to slice, but frees two
            num_tokens = TOKENS_PER_SLICE // len(states)
            size = TOKENS_IN_CACHE
        for start in range(0, len(first), num_tokens):
            part = slice(start, min(start + num_tokens, len(first)))
            read = [of_model[part].to(first.dtype) for of_model in states]
            logits = _logits(read, heads)
            for place in range(start, part.stop, size):
                span = slice(place, min(place + size, part.stop))
                work(span, [whole[place - start : span.stop - start] for whole in logits])
            if gradient is not None:
                gradient[part] = product(logits[0], heads[0])
            del logits  # frees them before those of the next slice are computed
        if gradient is None:
            return None
        return pad(self.placed(gradient), (0, 0, 0, 1))


def _logits(states: list[Tensor], heads: list[Tensor]) -> Sequence[Tensor]:
    """Return the logits [n, vocabulary] of each model."""
    if len(heads) == 1:
        return product(torch.cat(states), heads[0].T).chunk(len(states))
    return [product(read, head.T) for read, head in zip(states, heads, strict=True)]


@torch.no_grad()
def next_token_loss(
    hidden: Tensor,
    head_weight: Tensor,
    predicted: Predicted,
    *,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the negative log-likelihood of the next tokens, and its gradient.

    Args:
        hidden: [num_sequences, T, d] output of the final norm.
        head_weight: [vocabulary, d].
        predicted: the predicted tokens.
        with_gradient: whether to return the gradient of the summed loss.

    Returns:
        [num_sequences] float64 NLL of the data in nats, summed over the tokens that count, and the
        gradient at the hidden states [num_sequences, T, d], or None.
    """
    labels = predicted.labels
    nll = torch.empty(len(labels), dtype=torch.float64, device=hidden.device)

    def work(span: slice, logits_of_models: Sequence[Tensor]) -> None:
        (logits,) = logits_of_models
        wide = logits.float()
        targets = labels[span]
        probabilities, log_sums = _softmax(wide)
        nll[span] = log_sums - wide.gather(1, targets)[:, 0].double()
        if with_gradient:
            if predicted.chances is not None:
                targets = _drawn(probabilities, predicted.chances[span])
            minus_one = torch.full_like(targets, -1, dtype=probabilities.dtype)
            logits.copy_(probabilities.scatter_add_(1, targets, minus_one))

    gradient = predicted.work_on([hidden], [head_weight], work, with_gradient)
    return predicted.placed(nll).sum(dim=1), gradient


Dense = tuple[Tensor, Tensor | None]
"""The dense model's last hidden states [1, T, d] of a sequence, and its head if that differs."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of a model with the dense model, summed over the tokens that count."""

    # [num_sequences] float64, ``sum_v p_v (log p_v - log q_v)`` with p of the dense model, in nats
    divergence: Tensor
    nll: Tensor  # [num_sequences] float64, of the text, in nats
    # [num_sequences, T, d] gradient of the summed divergence with respect to the hidden states
    gradient: Tensor | None
    acceptance: Tensor | None = None  # [num_sequences] float64, ``sum_v min(p_v, q_v)``
    # [num_sequences] float64, 1 where both models have the same most likely token
    agreement: Tensor | None = None


@torch.no_grad()
def compare_with_dense(
    hidden: Tensor,
    dense: Tensor,
    predicted: Predicted,
    head_weight: Tensor,
    dense_head: Tensor | None = None,
    *,
    with_gradient: bool = False,
    with_acceptance: bool = False,
) -> Comparison:
    """Compare a model's next-token distributions with the dense model's and the text.

    See `next_token_loss`.

    Args:
        hidden: [num_sequences, T, d] output of the final norm.
        dense: [num_sequences, T, d] the same of the dense model, of any float dtype.
        predicted: the predicted tokens; the labels are those of the text.
        head_weight: [vocabulary, d] of both models.
        dense_head: [vocabulary, d of the dense model] head of the dense model, if it differs.
        with_gradient: whether to compute the gradient.
        with_acceptance: whether to compute acceptance and agreement. Source: docs/method.md,
            section 11.
    """
    labels = predicted.labels
    names = ["divergence", "nll"]
    if with_acceptance:
        names.extend(["acceptance", "agreement"])
    sums: dict[str, Tensor] = {}
    for name in names:
        sums[name] = torch.empty(len(labels), dtype=torch.float64, device=hidden.device)

    def work(span: slice, logits_of_models: Sequence[Tensor]) -> None:
        logits, dense_logits = logits_of_models
        own = logits.float()
        other = dense_logits.float()
        q, log_sums = _softmax(own)
        p, dense_log_sums = _softmax(other)
        sums["nll"][span] = log_sums - own.gather(1, labels[span])[:, 0].double()
        if with_acceptance:
            # the sum is twice the total variation
            sums["acceptance"][span] = 1 - (q - p).abs_().sum(dim=-1).double() / 2
            agrees = logits.argmax(dim=-1) == dense_logits.argmax(dim=-1)
            sums["agreement"][span] = agrees.double()
        # log p - log q, computed in place
        ratios = other.sub_(own).add_((log_sums - dense_log_sums).float()[:, None])
        sums["divergence"][span] = ratios.mul_(p).sum(dim=-1).double()
        if with_gradient:
            logits.copy_(q.sub_(p))

    heads = [head_weight]
    if dense_head is not None:
        heads.append(dense_head)
    gradient = predicted.work_on([hidden, dense], heads, work, with_gradient)
    totals: dict[str, Tensor] = {}
    for name, values in sums.items():
        totals[name] = predicted.placed(values).sum(dim=1)
    return Comparison(
        divergence=totals["divergence"],
        nll=totals["nll"],
        gradient=gradient,
        acceptance=totals.get("acceptance"),
        agreement=totals.get("agreement"),
    )


@torch.no_grad()
def next_tokens(
    hidden: Tensor, head_weight: Tensor, chances: Tensor, temperature: float
) -> Tensor:
    """Draw a next token for every sequence.

    Args:
        hidden: [m, d] output of the final norm at the last token.
        head_weight: [vocabulary, d].
        chances: [m] uniform random numbers in [0, 1), one per sequence; the drawn token is the
            first whose cumulated probability exceeds the number.
        temperature: divisor of the logits; 0 takes the most likely token.

    Returns:
        [m] int64.
    """
    logits = product(hidden, head_weight.T).float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    return _drawn(torch.softmax(logits / temperature, dim=-1), chances)[:, 0]


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax [n, vocabulary] of float32 logits, and log(sum_v exp) [n] float64.

    The largest probability is the inverse of sum_v exp(logit_v - largest logit). On a CPU this
    costs a fifth of `torch.logsumexp`. Probabilities there have a common factor of up to
    1 + 8e-6, which is divided out.
    """
    probabilities = torch.softmax(logits, dim=-1)
    largest = probabilities.amax(dim=-1).double() / probabilities.sum(dim=-1).double()
    return probabilities, logits.amax(dim=-1).double() - largest.log()


def _drawn(probabilities: Tensor, chances: Tensor) -> Tensor:
    """Return the labels [n, 1] drawn with the random numbers `chances` [n] in [0, 1).

    A label is the first whose cumulated probability [n, vocabulary] exceeds the number.
    """
    cumulated = probabilities.cumsum(dim=1)
    thresholds = chances[:, None] * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, thresholds, right=True)
    return drawn.clamp_(max=probabilities.shape[1] - 1)
