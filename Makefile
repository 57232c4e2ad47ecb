# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
# Torch comes from the package index unless told otherwise; builds without CUDA:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: demo test test-fast test-browser style lint docs site bench gpu-check validity torture support clean

# bytecode is kept whatever the environment says: tests start many processes, and each would compile all modules again
export PYTHONDONTWRITEBYTECODE =

demo: $(INSTALLED)
	$(BIN)/python train.py probe=layers

PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
test: style
	$(BIN)/mypy & types=$$!; $(PYTEST) -m "not docs and not gpu and not browser"; tests=$$?; wait $$types && exit $$tests

# while writing code: no linter, and none of the tests that take more than a third of a second or start several processes, such as
# whole runs, most fits and figures, simulations, thousands of problems, the model in the package and killed processes
test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow and not ddp and not docs and not gpu and not browser"

# the page of a run in headless Chromium, which has to be installed (Debian: apt-get install chromium); screenshots are in the
# folders that it prints
test-browser: $(INSTALLED)
	$(PIP) -q -e '.[browser]'
	$(BIN)/python -m pytest -q -s -m browser tests/webpage

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy

# the figures of README.md and docs/, and docs/results.md, from real runs (needs Chromium for pictures of pages); before, every
# command of the docs, smaller
SMALL := pipeline.path=runs/small/pipeline pipeline.frames=5 task.frames=5
docs: $(INSTALLED)
	$(BIN)/python -m pytest -q -m docs
	$(BIN)/python -m tests.examples.a14b docs/wan22.md
	$(BIN)/python -m cosprobe.reporting.gallery docs/figures/families.png
	for task in maze hide select line; do $(BIN)/python train.py probe=layers task=$$task || exit 1; done
	$(BIN)/python -m cosprobe.reporting.compare docs/figures/maps.png maze=runs/maze-layers:answer hide=runs/hide-layers:inside \
		select=runs/select-layers:answer line=runs/line-layers:answer
	$(BIN)/python probe.py use=early run=runs/maze-layers use.problems=300
	for task in maze line; do $(BIN)/python probe.py use=ensemble run=runs/$$task-layers use.size=full || exit 1; done
	for task in maze select; do for edit in swap steer erase ablate; do \
		$(BIN)/python probe.py use=intervene run=runs/$$task-layers use.edit=$$edit || exit 1; done; \
		$(BIN)/python probe.py use=intervene run=runs/$$task-layers use.edit=noise use.size=full || exit 1; done
	$(BIN)/python probe.py use=intervene run=runs/select-layers use.edit=steer use.size=full
	$(BIN)/python -m cosprobe.reporting.claims_page docs/causal.md 'causal-*/claims.json' maze=runs/maze-layers select=runs/select-layers
	for task in maze hide select line; do $(BIN)/python probe.py use=behaviour run=runs/$$task-layers use.problems=96 || exit 1; done
	$(BIN)/python probe.py use=lengths run=runs/maze-layers
	$(BIN)/python -m cosprobe.reporting.claims_page docs/behaviour.md behaviour-96problems/behaviour.json,lengths/lengths.json \
		maze=runs/maze-layers hide=runs/hide-layers select=runs/select-layers line=runs/line-layers
	$(BIN)/python -m cosprobe.webpage.gallery docs/gallery.md maze=runs/maze-layers hide=runs/hide-layers select=runs/select-layers \
		line=runs/line-layers
	cp runs/maze-layers/logistic/report/behaviour-96problems/behaviour.png runs/maze-layers/logistic/report/lengths/lengths.png docs/figures/
	$(BIN)/python probe.py use=film run=runs/maze-layers use.kind=choice
	cp runs/maze-layers/logistic/report/film/choice_*.gif docs/figures/film-choice.gif
	$(BIN)/python train.py probe=tokens
	$(BIN)/python probe.py use=tokens run=runs/maze-layers use.problems=24
	cp runs/maze-tokens/ridge/report/path.png docs/figures/tokens-path.png
	cd runs/maze-layers/logistic/report/tokens && cp one_exit_*[0-9]_energy.png ../../../../../docs/figures/tokens-energy.png && \
		cp one_exit_*[0-9]_components.png ../../../../../docs/figures/tokens-components.png
	cp runs/maze-layers/logistic/report/causal-noise-full/noise.png docs/figures/
	$(BIN)/python train.py probe=layers pipeline.steps=5 run_dir=runs/few-steps
	$(BIN)/python probe.py use=compare 'runs=[runs/maze-layers,runs/few-steps]'
	cp runs/maze-layers/logistic/report/compare-few-steps/few-steps.png docs/figures/compare.png
	cp runs/select-layers/logistic/report/causal-steer-full/steer.png docs/figures/
	cd runs/maze-layers/logistic/report && cp headline.png curves.png film.png checks.png generalisation.png ../../../../docs/figures/
	cd runs/maze-layers/logistic/report && cp early/frontier.png ../../../../docs/figures/early.png && cp ensemble/ensemble.png ../../../../docs/figures/
	cp runs/line-layers/logistic/report/ensemble/ensemble.png docs/figures/ensemble-line.png
	$(PIP) -q -e '.[browser]' && $(BIN)/python -m tests.screenshots runs/maze-layers/logistic docs/figures
	$(BIN)/python train.py experiment=mini_small run_dir=runs/small
	$(BIN)/python train.py experiment=lora pipeline.path=runs/small/pipeline run_dir=runs/adapter
	$(BIN)/python train.py probe=layers task=hide $(SMALL) run_dir=runs/hide-small
	$(BIN)/python train.py probe=layers task=hide $(SMALL) pipeline.lora=runs/adapter/adapter run_dir=runs/hide-adapted
	$(BIN)/python -m cosprobe.reporting.compare docs/figures/lora.png base=runs/hide-small:inside adapted=runs/hide-adapted:inside
	$(BIN)/python -m cosprobe.reporting.results_page docs/results.md maze=runs/maze-layers hide=runs/hide-layers select=runs/select-layers \
		line=runs/line-layers "hide, weaker model"=runs/hide-small "hide, weaker model with adapter"=runs/hide-adapted

# the documentation with the API reference, as HTML in site/; a warning is an error, so
# every page is read again (-E): a page that is not read gives no warning
site: $(INSTALLED)
	$(PIP) -q -e '.[site]'
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs . site
	cp site/README.html site/index.html

# ratios: capture, fit and run against what they replace or cannot avoid
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# the tests that need a GPU with CUDA, then what capture, probes and offloading cost on it (about three minutes); numbers in
# runs/gpu-check.json, and with PAGE=docs/support.md as a table between the comments <!-- gpu --> and <!-- /gpu --> of that page
gpu-check: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu $(PAGE)

# coverage of every interval and size of every test, by simulation with known truth (about 35 minutes)
validity: $(INSTALLED)
	$(BIN)/python -m validity docs/validity.md

# kills, signals, lost processes, bad inputs, flipped bits, full disks, two commands at once: prints counts (about 45 minutes
# on one core)
torture: $(INSTALLED)
	$(BIN)/python -m tests.torture

# every family of video pipelines at toy size, from its blocks to the last command: docs/support.md (about 20 minutes on one core)
support: $(INSTALLED)
	$(BIN)/python -m tests.conformity docs/support.md

# torch first and alone: what follows then finds the build that was chosen and keeps it
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info
