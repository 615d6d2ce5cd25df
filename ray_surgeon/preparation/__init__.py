"""What is read and checked before a worker starts."""
