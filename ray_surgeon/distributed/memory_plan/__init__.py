"""Plan: what every step of a job needs on a worker, and where workers keep things."""
