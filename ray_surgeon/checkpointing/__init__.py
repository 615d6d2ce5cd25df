"""The run directory: committed shots, and parts of shots from which a run can resume."""
