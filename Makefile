# Every target sets up what it needs on a fresh machine.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help venv demo test lint bench faults data-faults slurm-test full-size lock clean
help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(READY): requirements.lock pyproject.toml
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 13)))' || { echo "sdtrain needs Python 3.11 or 3.12; call: make PYTHON=python3.12"; rm -rf $(VENV); exit 9; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

venv: $(READY)  ## Make the environment in .venv

demo: $(READY)  ## Metadata to samples on two cores: the whole product on handwritten digits
	$(BIN)/python -m launcher.demo

test: $(READY) lint  ## Lint, then every test that this machine can run
	$(BIN)/python -m tests.run

lint: $(READY)  ## ruff, pyright and the layers of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(READY)  ## Measure ours beside diffusers on this machine
	$(BIN)/python -m benchmarks.unet

faults: $(READY)  ## Kill and damage runs 200 times at random moments, then the other long tests; an hour
	$(BIN)/python -W ignore -m tests.faults.campaign --kills 200
	$(BIN)/python -m tests.run --long tests/faults tests/distributed tests/unit

data-faults: $(READY)  ## Kill ingestions 50 times at random moments, then the long tests of the data; half an hour
	$(BIN)/python -W ignore -m tests.data.kills --kills 50
	$(BIN)/python -m tests.run --long tests/data

slurm-test: $(READY)  ## Every fault on a real two-node Slurm of this machine (as root); half an hour
	SDTRAIN_REQUIRE_SLURM=1 $(BIN)/python -m pytest -q tests/slurm

full-size: $(READY)  ## One real ZeRO-2 step of the 859,520,964-parameter UNet in bf16
	$(BIN)/python -m benchmarks.full_size

lock:  ## Resolve requirements.lock anew
	$(BIN)/uv pip compile pyproject.toml --all-extras --no-emit-index-url --generate-hashes --universal --python-version 3.11 --no-header -o requirements.lock

clean:  ## Remove the environment and what the demo made
	rm -rf $(VENV) demo
