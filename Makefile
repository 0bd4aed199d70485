# Two commands: `make demo` shows what it does, `make test` checks that it does.
# Both make the virtual environment in .venv and install what they need, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint docs bench quality adapter adapter-qwen calibration weights predictors clean

demo: $(VENV)/adapter.installed
	$(BIN)/python demo/run.py

# One process a core, and one thread in each: they would only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4

test-slow: $(VENV)/test.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench.installed
	$(BIN)/python benchmarks/engine.py --quick

# The documentation as a site, in build/site; a link that leads nowhere is an error.
docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What memories are worth, in one table; hours. Interrupted, it goes on. `make quality QUALITY=--quick`
# takes ten minutes, `QUALITY='--models smollm2-135m'` one model.
QUALITY :=
quality: $(VENV)/adapter.installed
	$(BIN)/python benchmarks/quality.py $(QUALITY)

# The adapter that comes with memdb, anew; Debian's packages are its text. Interrupted, it goes on.
RECIPE := recipes/smollm2-135m-memory3
adapter: build/adapter/corpus.jsonl
	test -e build/adapter/questions.jsonl || cp $(RECIPE)/questions.jsonl build/adapter
	OMP_NUM_THREADS=1 $(BIN)/memdb train --corpus build/adapter/corpus.jsonl --out build/adapter \
	  --steps 400 --rank 8 --lr 7e-4 --references 1-5 --held-out 16 --evaluate-every 200 \
	  --self-questions 192 --plot build/adapter/log.svg

build/adapter/corpus.jsonl: $(RECIPE)/corpus.py | $(VENV)/adapter.installed
	mkdir -p build/adapter
	$(BIN)/python $(RECIPE)/corpus.py $@ --documents 2000

# The reading adapter for Qwen2.5-Coder-0.5B, of the same text.
QWEN := qwen2.5-coder-0.5b
adapter-qwen: build/adapter/corpus.jsonl
	mkdir -p build/adapter-qwen
	test -e build/adapter-qwen/questions.jsonl || \
	  cp recipes/$(QWEN)-memory3/questions.jsonl build/adapter-qwen
	OMP_NUM_THREADS=1 $(BIN)/memdb train --model $(QWEN) --path read --corpus $< \
	  --out build/adapter-qwen --steps 143 --rank 8 --lr 2e-4 --targets q_proj,k_proj,v_proj,o_proj \
	  --kl-weight 1 --nll-weight 0 --budgets 384,768 --references 1-5 --held-out 12 \
	  --evaluate-every 60 --self-questions 48 --plot build/adapter-qwen/log.svg

# Constants by which a model's memories are weighed, measured on text that is in no test; an hour or
# less. Interrupted, it goes on. `make calibration MODEL=qwen2.5-coder-0.5b FRAMING=plain`
MODEL := smollm2-135m
FRAMING := chat
CALIBRATED = build/calibration/$(MODEL)-$(FRAMING).db
calibration: build/calibration/corpus.jsonl
	test -e $(CALIBRATED) || $(BIN)/memdb init --db $(CALIBRATED) --model $(MODEL) --framing $(FRAMING)
	$(BIN)/memdb ingest --cold --db $(CALIBRATED) build/calibration/corpus.jsonl
	$(BIN)/memdb calibrate --db $(CALIBRATED)

build/calibration/corpus.jsonl: recipes/calibration/foldoc.py | $(VENV)/adapter.installed
	mkdir -p build/calibration
	$(BIN)/python recipes/calibration/foldoc.py $@

# The head weights that come with memdb, anew: minutes. Interrupted, it goes on.
WEIGHTED := smollm2-135m qwen2.5-coder-0.5b
weights: $(WEIGHTED:%=model_adapter/catalog/data/%.json)

model_adapter/catalog/data/%.json: build/weights/%.jsonl recipes/head_weights.py
	$(BIN)/python recipes/head_weights.py $< $@

# The predictors of contributions that come with memdb, anew: minutes. Interrupted, it goes on.
PREDICTED := $(WEIGHTED) qwen2.5-coder-1.5b
LEARNED := 96
model_adapter/catalog/data/qwen2.5-coder-1.5b.safetensors: LEARNED := 54
predictors: $(PREDICTED:%=model_adapter/catalog/data/%.safetensors)

model_adapter/catalog/data/%.safetensors: build/weights/corpus.jsonl
	OMP_NUM_THREADS=1 $(BIN)/memdb predictor --model $* --framing chat --references $(LEARNED) --corpus $< --out $@

# An unfinished one stays: it goes on from there.
.PRECIOUS: build/weights/%.jsonl
build/weights/%.jsonl: build/weights/corpus.jsonl
	OMP_NUM_THREADS=1 $(BIN)/memdb head-weights --model $* --framing chat --passages 32 \
	  --corpus $< --out $@

build/weights/corpus.jsonl: $(RECIPE)/corpus.py | $(VENV)/adapter.installed
	mkdir -p build/weights
	$(BIN)/python $(RECIPE)/corpus.py $@ --package dict-foldoc --documents 1000

clean:
	rm -rf $(VENV) demo/build build

# Kernels where a C compiler is: without them memdb computes the same, more slowly.
KERNELS := kernels/pyproject.toml $(wildcard kernels/memdb_kernels/*.*)
$(VENV)/adapter.installed: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	@echo "Installing memdb and the model adapter into $(VENV) (about a minute) ..."
	@start=$$(date +%s); $(INSTALL) -e '.[adapter]' && \
	echo "installed in $$(( $$(date +%s) - start )) s"
	@command -v $${CC:-cc} > /dev/null && $(INSTALL) --force-reinstall ./kernels || \
	echo "memdb's kernels are not installed (they need a C compiler): it decodes more slowly"
	@touch $@

$(VENV)/test.installed: $(VENV)/adapter.installed
	@echo "Installing the test tools ..."
	@$(INSTALL) -e '.[adapter,files,test]'
	@touch $@

$(VENV)/bench.installed: $(VENV)/adapter.installed
	@echo "Installing what the benchmarks measure against ..."
	@$(INSTALL) -e '.[adapter,bench]'
	@touch $@

$(VENV)/docs.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what makes the site ..."
	@$(INSTALL) -e '.[docs]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("memdb needs Python 3.11 or newer; " + sys.executable + " is " + sys.version.split()[0] + ". Say which: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
