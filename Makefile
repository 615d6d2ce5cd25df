# make test, make fast, make lint, make docs: what CI does, piece by piece, in the environment that is active
.PHONY: lint fast test docs

lint:
	ruff check .
	ruff format --check .
	codespell
	mypy
	lint-imports

fast:
	pytest -m fast --no-cov

test:
	pytest

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
