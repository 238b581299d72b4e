# `make demo` and `make test` do all set-up on a fresh machine with Python 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs slow lint types format benchmark clean

demo: .venv/installed
	$(BIN)/qopt optimize examples/fashion_resnet.pt --data examples/fashion.npz --target int4 --robust --no-cache \
		--baseline int4:max --baseline int2:max --baseline int4@int4 -o demo
	@$(BIN)/python examples/show_lessons.py demo/report.json

# One process per core with one thread each: threads of processes that share cores only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

test: .venv/installed-dev
	$(PYTEST) -m "not slow and not long"

docs: .venv/installed-docs
	$(BIN)/sphinx-build -W --keep-going -n -q docs build/docs
	@echo The documentation is build/docs/index.html

# Needs QOPT_ASSETS, the folder of the public networks; takes an hour and more on 2 cores.
slow: .venv/installed-dev
	$(PYTEST)
	$(BIN)/python benchmarks/main_job.py
	$(BIN)/python benchmarks/ptq.py --networks resnet20_cifar10_std --draws 3 --bits 3,2.5,2
	$(BIN)/python benchmarks/ptq.py --networks resnet20_cifar10_std --draws 3 --bits 4,3,2 \
		--options '{"search":"uniform"}'
	$(BIN)/python benchmarks/streaming.py --whole --parameters 5e7,1e9

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy qopt tests

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@
