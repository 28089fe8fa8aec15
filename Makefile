# What a person does here, and what CI does, is one of these. `make` lists them.
SHELL := /bin/bash
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

# Data sets: $GENROBUST_DATA, made absolute since notebooks run in nbs/; a folder that lies beside the checkout will do.
GENROBUST_DATA ?= $(wildcard ../shared/data)
ifneq ($(GENROBUST_DATA),)
export GENROBUST_DATA := $(abspath $(GENROBUST_DATA))
endif

.PHONY: help reproduce study evaluations others bench referee test test-gpu lint format sync notebooks-test wheel slow notebooks readme docs
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s%s\n", $$1, $$2}' Makefile

# `make test PINS='torch==2.4.* numpy==1.26.*'` is for other versions than the newest.
PINS ?=
INSTALL := $(if $(shell command -v uv),uv pip install -q -p .venv,$(BIN)/pip install -q --no-compile)
.venv/ready: settings.ini setup.py
	@echo "Installing genrobust and its development tools into .venv (once)"
	@if command -v uv > /dev/null; then uv venv -q --allow-existing .venv; else python3 -m venv .venv; fi
	@$(INSTALL) -e '.[dev]' $(PINS)
	@touch $@

reproduce: .venv/ready ## Measure what the report measured, in about five minutes on two cores
	genrobust reproduce --preset quick

TWO := torchrun --no-python --nproc-per-node 2
STUDY := $(TWO) genrobust reproduce --preset standard
BALLS := L2_0.5 L2_1 L2_2 Linf_0.02 Linf_0.05 Linf_0.1
STRONG := $(foreach form,Restarted Targeted,$(foreach ball,$(BALLS),'$(form) APGD, $(subst _, ,$(ball))'))
study: .venv/ready ## Measure what results/ holds of the study again, in a few hours on two cores
	@awk -F '[:,]' '/"seconds"/ {took += $$2} END {printf "The results here took %.1f hours of a core\n", took / 3600}' $(foreach part,standard strong strong_bayes others,results/$(part)/settings.json)
	$(STUDY) --models dfz gfz cnn cnn_at
	$(STUDY) --models cnn cnn_at --attacks Carlini-Wagner $(STRONG) --test 200 --carlini-wagner 200 --out results/strong
	$(STUDY) --models gfz --attacks Carlini-Wagner --test 200 --carlini-wagner 200 --out results/strong_bayes
	$(STUDY) --models dfx dbx gfy gby gbz --attacked 40 --carlini-wagner 5 --zoo 2 --apgd 40 --out results/others

IMAGES ?= 200
evaluations: .venv/ready ## Evaluate our models by the call for yours, in half a day on two cores, by its plan; it goes on where it stopped
	$(TWO) -- genrobust evaluate cnn cnn_at cnn_at_l2 gfz gfz_at dfz --p 2 inf --images $(IMAGES) --folder results/evaluate/$(IMAGES)

others: .venv/ready ## Install other libraries of attacks, and run the tests that wait for them
	$(INSTALL) -e '.[bench]'
	-$(INSTALL) 'setuptools<81' wheel && $(INSTALL) --no-build-isolation adv-lib
	-pytest -q tests/test_crosschecks.py tests/test_referee.py

bench: others ## Time the attacks beside those of other libraries
	genrobust bench

referee: others ## Compare the attacks with those of other libraries by their optimality, in a few hours on two cores; it goes on where it stopped
	genrobust bench --optimality

# glibc returns large blocks to Linux whenever one is freed, and Linux blanks them before it lends them again:
# up to a fifth of the time of a test. So it keeps them.
test test-gpu notebooks-test: export MALLOC_MMAP_THRESHOLD_ := 1073741824
test test-gpu notebooks-test: export MALLOC_TRIM_THRESHOLD_ := 4294967296
test: .venv/ready lint sync ## All tests: style, notebooks and modules in step, fast cells, the wheel, a pretended GPU, pytest
	$(MAKE) --no-print-directory -j2 notebooks-test wheel test-gpu
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist worksteal --durations=15 tests

# A pretended GPU hangs on the insides of PyTorch: where it does not work with the one in .venv, it gets the last that it was
# seen to work with, in an environment of its own. `pretended_gpu.py` says whether it works; tests are skipped where it cannot.
GPU_TORCH := torch==2.14.1
test-gpu: .venv/ready ## All parts on a pretended GPU, in a few minutes: it needs Linux and g++, but neither card nor driver
	@python tests/gpu/pretended_gpu.py || $(MAKE) --no-print-directory .venv-gpu/ready
	@export PATH=$$(ls -d $(CURDIR)/.venv-gpu/bin 2> /dev/null || echo $(BIN)):$$PATH PYTHONPATH=$(CURDIR)/tests/gpu OMP_NUM_THREADS=1 MPLBACKEND=agg; \
	echo pytest -p pretended_gpu tests/gpu; pytest -q -n 2 --dist worksteal -rs -p pretended_gpu tests/gpu

.venv-gpu/ready:
	@echo "Installing $(GPU_TORCH) for the pretended GPU into .venv-gpu (once)"
	@if command -v uv > /dev/null; then uv venv -q --allow-existing .venv-gpu; else python3 -m venv .venv-gpu; fi
	@$(subst .venv,.venv-gpu,$(INSTALL)) -e '.[dev]' $(GPU_TORCH) || (rm -rf .venv-gpu; echo 'No pretended GPU: $(GPU_TORCH) cannot be installed')
	@if [ -d .venv-gpu ]; then touch $@; fi

lint: .venv/ready ## Check format and style of notebooks and tests, and names in modules, with ruff
	ruff format --check nbs tests
	ruff check nbs tests
	ruff check --select F821 genrobust

format: .venv/ready ## Format notebooks and tests with ruff
	ruff format nbs tests

sync: .venv/ready ## Check that notebooks are clean and modules are exported
	@state() { git status --porcelain; git diff | git hash-object --stdin; }; before=$$(state); nbdev_clean; nbdev_export; \
	if [ "$$before" != "$$(state)" ]; then echo 'Notebooks were not clean or modules not exported; now they are:'; git status --short; exit 1; fi

notebooks-test: .venv/ready ## Run the fast cells of all notebooks, and see that they write nothing to results/
	@before=$$(git status --porcelain results); OMP_NUM_THREADS=1 MPLBACKEND=agg nbdev_test --timing && \
	if [ "$$before" != "$$(git status --porcelain results)" ]; then echo 'Fast cells wrote to results/:'; git status --short results; exit 1; fi

VERSION := $(shell sed -n 's/^version = //p' settings.ini)
wheel: .venv/ready ## Build sdist and wheel, and run the README's example and one attack from the wheel in an empty environment
	@case "$$GITHUB_REF" in refs/tags/v*) test "$$GITHUB_REF" = refs/tags/v$(VERSION) || { echo "The tag is not v$(VERSION), the version in settings.ini"; exit 1; };; esac
	rm -rf build dist
	python -m build -q
	bash tests/wheel.sh

slow: .venv/ready ## Run all notebooks, slow cells too, and save their outputs; slow cells write to results/
	python tests/notebooks.py slow

notebooks: .venv/ready ## Run the fast cells of all notebooks and save their outputs
	python tests/notebooks.py fast

readme: .venv/ready ## Print nbs/index.ipynb to README.md
	python tests/notebooks.py readme

docs: .venv/ready ## Render the site to _docs/, with Quarto
	python tests/notebooks.py pages
	@if ! command -v quarto > /dev/null; then echo 'The pages are processed in _proc/. To render them install Quarto (https://quarto.org/docs/get-started/) and run this again.'; exit 1; fi
	cd _proc && quarto render --no-cache && rm -rf ../_docs && mv _docs ..
