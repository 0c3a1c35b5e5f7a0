# make demo   the whole pipeline in a small world of its own: SFT, reward model, PPO, DPO, evaluation (about 3 minutes)
# make test   the test suite           make lint   ruff and mypy
# make bench  speed and memory beside peers, a night (ARGS=--quick for a try, ARGS=--plan for a list)
# make format ruff's layout            make wheel  build the package       make clean  forget the environment
#
# Each does its own set-up the first time: a virtual environment in .venv with the exact versions of requirements.lock.
# PYTHON=python3.12 make test   chooses the interpreter;   make test ARGS="-k ppo"   passes arguments on.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Test processes at a time. Each uses one thread, so that results do not depend on how many cores there are.
JOBS   ?= 2

BIN   := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format bench wheel clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/palate run quickstart $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/run.py $(ARGS)

wheel: $(READY)
	$(BIN)/python -m hatchling build -t wheel

clean:
	rm -rf $(VENV) dist

# The package is installed in place and without its dependencies: the lock has them all. The stamp is written last, so
# an interrupted set-up starts again, and a change of the lock or of pyproject.toml is followed.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "palate needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@echo "Making $(VENV) from requirements.lock; the first time this downloads packages and takes some minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --progress-bar off -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@
