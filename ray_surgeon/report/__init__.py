"""Records of a run: its directory, its events, its report and what people see of it."""
