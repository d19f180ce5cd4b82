# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv if there is none.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Modules are kept compiled: tests and benchmarks start many processes.
export PYTHONDONTWRITEBYTECODE =

# More arguments for pytest. Shapes and types are checked by `make test`; elsewhere that would cost a fifth of the time.
PYTEST =
UNCHECKED = --jaxtyping-packages=

.PHONY: demo gallery test slow lint parity

$(VENV)/installed: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(RUN) -m ldm_jax.demo --workdir runs/demo

# Every task on the model that `make demo` trained.
gallery: $(VENV)/installed
	test -d runs/demo/model/checkpoints || $(MAKE) demo
	$(RUN) -m ldm_jax.gallery --workdir runs/demo/model --out docs/gallery

test: $(VENV)/installed
	$(RUN) -m pytest $(PYTEST) -n auto --dist worksteal -m "not parity and not slow"

# Whole trainings, killed and resumed; real processes; every task compiled.
slow: $(VENV)/installed
	$(RUN) -m pytest $(UNCHECKED) -n auto --dist worksteal -m "not parity and slow"

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The PyTorch references; without TORCH it takes the newest release. The last three would choose a torch of their own.
TORCH ?= torch
parity: $(VENV)/installed
	$(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet --editable ".[dev,parity]"
	$(RUN) -m pip install --quiet --no-deps "torch-fidelity>=0.4" "lpips>=0.1.4" torchvision==0.28.0
	$(RUN) -m pytest $(UNCHECKED) -n auto --dist worksteal -m parity
