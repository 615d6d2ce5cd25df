"""A run's record: its directory, events, metrics, report and figures."""
