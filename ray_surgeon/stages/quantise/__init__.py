"""Quantised copies: linears rounded on the workers, by the curvature of what was pruned."""
