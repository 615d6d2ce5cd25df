"""Low-rank corrections after every shot."""
