"""Reading and checks before a worker starts."""
