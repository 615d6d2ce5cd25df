"""Short scripts, each run with ``python -m examples.NAME`` or ``python examples/NAME.py``."""
