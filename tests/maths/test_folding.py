"""A removed layer's output folded into an earlier linear, against least squares."""

from __future__ import annotations

import torch

from ray_surgeon.maths.folding import folded


def test_folding_is_damped_least_squares() -> None:
    """Against the pseudoinverse of the stacked problem over tokens; dead inputs are left alone."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    W, x, d = make(3, 7), make(50, 7), make(50, 3)
    x[:, 4] = 0
    new, gain = folded(W, x.T @ x, d.T @ x, 0.1, 1.0, "linear")
    live = [0, 1, 2, 3, 5, 6]
    own = x[:, live]
    ridge = (0.1 * own.square().sum(0).mean()).sqrt() * torch.eye(6, dtype=torch.float64)
    padded = torch.cat([d, torch.zeros(6, 3, dtype=torch.float64)])
    X = torch.linalg.lstsq(torch.cat([own, ridge]), padded).solution.T
    torch.testing.assert_close(new[:, live], W[:, live] + X)
    assert torch.equal(new[:, 4], W[:, 4])
    left = (d - own @ X.T).square().sum()
    torch.testing.assert_close(torch.tensor(gain), (d.square().sum() - left).float())


def test_folding_does_not_depend_on_the_curvature_of_the_stream() -> None:
    """The gradient of E[(d - X a)^T G (d - X a)] is zero for any G where it is zero for G = I."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    d = torch.randn(40, 4, dtype=torch.float64, generator=generator)
    root = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    X, _ = folded(
        torch.zeros(4, 5, dtype=torch.float64), x.T @ x, d.T @ x, 0.0, 1.0, "linear"
    )
    X.requires_grad_()
    rest = d - x @ X.T
    ((rest @ root) ** 2).sum().backward()
    assert X.grad is not None
    assert float(X.grad.abs().max()) < 1e-9
