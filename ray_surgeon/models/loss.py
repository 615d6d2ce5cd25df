"""Loss at the head, in slices of tokens: the logits of a whole sequence never exist at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ray_surgeon.maths.products import product

TOKENS_PER_SLICE = 128
"""128 tokens x 50k vocabulary x 4 bytes = 25 MiB."""
TOKENS_IN_CACHE = 8
"""Of a slice on a CPU, whose probabilities then stay in a core's cache from step to step.

A GPU takes a slice at once.
"""


def bytes_at_the_head(vocab_size: int, width: int, *, on_cpu: bool) -> int:
    """Return the most bytes that a loss takes beside the hidden states.

    These are the logits of a slice, on other devices than CPUs of both models, and what is worked
    on in float32.

    Args:
        vocab_size: of the model.
        width: bytes of a logit.
        on_cpu: whether parts that stay in the cache are worked on together; the C library's heap
            then holds as much again, as measured.
    """
    at_once = 2 * TOKENS_IN_CACHE if on_cpu else TOKENS_PER_SLICE
    num_logits = TOKENS_PER_SLICE * (1 if on_cpu else 2)
    return vocab_size * (num_logits * width + at_once * 20)


def perplexity_of(mean: float) -> float:
    """Return exp of a mean NLL in nats, infinite where it is too large for a number.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    if math.isnan(mean):
        problem = "the loss on the evaluation text is not a number"
        raise FloatingPointError(f"{problem}; check the weights")
    return math.exp(mean) if mean < 700 else math.inf


_Work = Callable[..., None]


class Predicted:
    """The tokens that are predicted: position t predicts token t + 1, so T - 1 in each sequence."""

    def __init__(
        self, tokens: Tensor, counts: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Look them up.

        Args:
            tokens: [num_sequences, T] int64.
            counts: [num_sequences, T] bool, whether a token counts as something that is predicted:
                the loss of position t counts if token t + 1 does. None if all count. The others
                have no logits, no loss and a gradient of 0.
            generator: of the CPU; if given, the labels of the gradient are drawn from the model
                (sampled Fisher) instead of the data, the same ones on every device, and the same
                ones whichever tokens count.
        """
        self._shape = tokens[:, 1:].shape
        self._places = None if counts is None else counts[:, 1:].reshape(-1).nonzero()[:, 0]
        self.labels = self.chosen(tokens[:, 1:, None])  # [n, 1]
        self.chances: Tensor | None = None  # [n], by which labels are drawn
        if generator is not None:
            of_all = torch.rand(self._shape.numel(), generator=generator).to(tokens.device)
            self.chances = self.chosen(of_all[:, None])[:, 0]

    def chosen(self, rows: Tensor) -> Tensor:
        """Return the rows [n, d] of [num_sequences, T - 1, d] that predict one of them."""
        flat = rows.reshape(-1, rows.shape[-1])
        return flat if self._places is None else flat[self._places]

    def placed(self, rows: Tensor) -> Tensor:
        """Return rows [n, ...] as [num_sequences, T - 1, ...], the others zero."""
        if self._places is not None:
            of_all = rows.new_zeros(self._shape.numel(), *rows.shape[1:])
            rows = of_all.index_copy_(0, self._places, rows)
        return rows.view(*self._shape, *rows.shape[1:])

    def work_on(
        self, hidden: list[Tensor], heads: list[Tensor], work: _Work, with_gradient: bool
    ) -> Tensor | None:
        """Call ``work(places, logits, ...)`` on parts of the tokens that are worked on together.

        Args:
            hidden: what the head reads [num_sequences, T, d], once for every logits
                [len(places), vocabulary].
            heads: its weight [vocabulary, d]; or those of all, if they are not one.
            work: if a gradient is wanted, it leaves that at the first logits in their place.
            with_gradient: whether to return the gradient at the first hidden states.
        """
        states = [self.chosen(of_model[:, :-1]) for of_model in hidden]
        first = states[0]
        gradient = torch.empty_like(first) if with_gradient else None
        size = num_tokens = TOKENS_PER_SLICE
        if first.device.type == "cpu":
            # the C library keeps one piece of memory from slice to slice, but gives two back
            num_tokens = TOKENS_PER_SLICE // len(states)
            size = TOKENS_IN_CACHE
        for start in range(0, len(first), num_tokens):
            part = slice(start, min(start + num_tokens, len(first)))
            read = [of_model[part].to(first.dtype) for of_model in states]
            if len(heads) == 1:
                logits = product(torch.cat(read), heads[0].T).chunk(len(states))
            else:
                logits = tuple(product(read[i], heads[i].T) for i in range(len(heads)))
            for place in range(start, part.stop, size):
                span = slice(place, min(place + size, part.stop))
                work(span, *(whole[place - start : span.stop - start] for whole in logits))
            if gradient is not None:
                gradient[part] = product(logits[0], heads[0])
            del logits  # before the next slice's are made
        return None if gradient is None else pad(self.placed(gradient), (0, 0, 0, 1))


@torch.no_grad()
def next_token_loss(
    hidden: Tensor, head_weight: Tensor, predicted: Predicted, *, with_gradient: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Negative log-likelihood of the next tokens, and its gradient at the hidden states.

    Args:
        hidden: [num_sequences, T, d] output of the final norm.
        head_weight: [vocabulary, d].
        predicted: tokens.
        with_gradient: whether to return the gradient of the summed loss.

    Returns:
        [num_sequences] float64 NLL of the data in nats, summed over the tokens that count, and the
        gradient [num_sequences, T, d] or None.
    """
    labels = predicted.labels
    nll = torch.empty(len(labels), dtype=torch.float64, device=hidden.device)

    def work(span: slice, logits: Tensor) -> None:
        wide = logits.float()
        targets = labels[span]
        probabilities, log_sums = _softmax(wide)
        nll[span] = log_sums - wide.gather(1, targets)[:, 0].double()
        if with_gradient:
            if predicted.chances is not None:
                targets = _drawn(probabilities, predicted.chances[span])
            minus = torch.full_like(targets, -1, dtype=probabilities.dtype)
            logits.copy_(probabilities.scatter_add_(1, targets, minus))

    gradient = predicted.work_on([hidden], [head_weight], work, with_gradient)
    return predicted.placed(nll).sum(dim=1), gradient


Dense = tuple[Tensor, Tensor | None]
"""The dense model's last hidden states [1, T, d] of a sequence, and its head if it has its own."""


@dataclass(frozen=True)
class Comparison:
    """A model beside the dense one, summed over each sequence's tokens that count."""

    # [num_sequences] float64, ``sum_v p_v (log p_v - log q_v)`` with p of the dense model, in nats
    divergence: Tensor
    nll: Tensor  # [num_sequences] float64, of the text, in nats
    # [num_sequences, T, d] of the summed divergence with respect to the hidden states
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
        dense: [num_sequences, T, d] of the dense model, of any float dtype.
        predicted: tokens; labels are the text's.
        head_weight: [vocabulary, d] of both.
        dense_head: [vocabulary, another d] of the dense model, if it has one of its own.
        with_gradient: whether the gradient is wanted.
        with_acceptance: whether acceptance and agreement are wanted. Source: docs/method.md,
            section 11.
    """
    labels = predicted.labels
    names = ("divergence", "nll", *(("acceptance", "agreement") if with_acceptance else ()))
    sums = {n: torch.empty(len(labels), dtype=torch.float64, device=hidden.device) for n in names}

    def work(span: slice, logits: Tensor, wanted: Tensor) -> None:
        own = logits.float()
        other = wanted.float()
        q, log_sums = _softmax(own)
        p, dense_log_sums = _softmax(other)
        sums["nll"][span] = log_sums - own.gather(1, labels[span])[:, 0].double()
        if with_acceptance:
            # twice the total variation
            sums["acceptance"][span] = 1 - (q - p).abs_().sum(dim=-1).double() / 2
            sums["agreement"][span] = (logits.argmax(dim=-1) == wanted.argmax(dim=-1)).double()
        # log p - log q, where the dense model's logits were
        ratios = other.sub_(own).add_((log_sums - dense_log_sums).float()[:, None])
        sums["divergence"][span] = ratios.mul_(p).sum(dim=-1).double()
        if with_gradient:
            logits.copy_(q.sub_(p))

    heads = [head_weight] if dense_head is None else [head_weight, dense_head]
    gradient = predicted.work_on([hidden, dense], heads, work, with_gradient)
    of_each = {name: predicted.placed(values).sum(dim=1) for name, values in sums.items()}
    return Comparison(gradient=gradient, **of_each)


@torch.no_grad()
def next_tokens(hidden: Tensor, head_weight: Tensor, chances: Tensor, temperature: float) -> Tensor:
    """Draw a next token for every sequence.

    Args:
        hidden: [m, d] output of the final norm at the last token.
        head_weight: [vocabulary, d].
        chances: [m] uniform in [0, 1); a token is drawn where the cumulated probabilities pass its
            sequence's.
        temperature: logits are divided by it; 0 takes the most likely token.

    Returns:
        [m] int64.
    """
    logits = product(hidden, head_weight.T).float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    return _drawn(torch.softmax(logits / temperature, dim=-1), chances)[:, 0]


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax [n, vocabulary] of float32 logits, and log(sum_v exp) [n] float64.

    The largest probability is one over the sum of exp(logit - the largest). On a CPU that costs a
    fifth of `torch.logsumexp`; probabilities there have a common factor of up to 1 + 8e-6, which is
    taken off again.
    """
    probabilities = torch.softmax(logits, dim=-1)
    largest = probabilities.amax(dim=-1).double() / probabilities.sum(dim=-1).double()
    return probabilities, logits.amax(dim=-1).double() - largest.log()


def _drawn(probabilities: Tensor, chances: Tensor) -> Tensor:
    """Return for each token the label [n, 1] at its chance.

    There the cumulated probabilities [n, vocabulary] pass the chance [n] in [0, 1).
    """
    cumulated = probabilities.cumsum(dim=1)
    drawn = torch.searchsorted(cumulated, chances[:, None] * cumulated[:, -1:], right=True)
    return drawn.clamp_(max=probabilities.shape[1] - 1)
