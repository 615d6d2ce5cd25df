"""The run directory: committed shots, and what a run goes on from."""
