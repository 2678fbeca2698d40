# The few commands of every day; CONTRIBUTING.md says when.
.PHONY: build test lint format results docs

build:
	pip install -e ".[dev]"

test:
	python -m pytest -n 2 --dist worksteal

lint:
	ruff check .
	ruff format --check .
	mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.inl' 'tests/*.h' 'tests/*.cpp' | xargs clang-format --dry-run --Werror

format:
	ruff check --fix .
	ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.inl' 'tests/*.h' 'tests/*.cpp' | xargs clang-format -i

results:
	python -m bench.summary
	python -m experiments.page

docs:
	python -m sphinx -W docs docs/_build
