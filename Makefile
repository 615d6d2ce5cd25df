# make test, make fast, make coverage, make lint, make docs: what CI does, piece by piece, in the environment that is active
.PHONY: lint fast test nightly coverage docs

lint:
	ruff check .
	ruff format --check .
	codespell
	mypy
	lint-imports

fast:
	pytest -m fast

test:
	pytest

nightly: # what is slow, loses machines, or runs engines; see CONTRIBUTING.md for their environments
	pytest -n 0 --timeout 1800 -m "slow or chaos or serve"

coverage: # half as long again
	pytest --cov

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
