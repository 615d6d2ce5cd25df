"""Short scripts, each run with ``python -m examples.NAME``."""
