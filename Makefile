# make dreambooth   install, train BOFT on an embedded subject on the CPU, show what came out
# make controlnet   install, train light control with BOFT on the CPU, score it, show what came out
# make test         install, run every test
# make quality      ruff: lint and format; mypy: types
#
# PIP_ARGS is passed to pip: on Linux without a GPU, PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# saves the CUDA build of torch (several GB).

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin

.PHONY: dreambooth controlnet test quality clean

SUBJECT ?= mug
export SUBJECT

dreambooth: $(VENV)/.installed
	$(BIN)/python scripts/quickstart.py dreambooth

controlnet: $(VENV)/.installed
	$(BIN)/python scripts/quickstart.py controlnet

test: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV)
