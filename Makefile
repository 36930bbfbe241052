# Short commands. `make book` and `make test` set up everything that they need.
PYTHON ?= python3
# Colab's own, else the nearest that is at hand.
COLAB_PYTHON ?= $(firstword $(foreach p,python3.13 python3.12,\
	$(shell $(p) -c 'print("$(p)")' 2> /dev/null)) $(PYTHON))
PORT ?= 8000
WORKERS ?= 2
BIN := .venv/bin
SETUP := .venv/.setup-done
BOOK := _build/html/.book-done
# The adapters library needs an older transformers: an environment of its own.
HUB := .venv-adapterhub
COLAB := .venv-colab
NEWEST := .venv-newest
# One thread for each worker: two workers share two cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
OFFLINE := HF_HUB_OFFLINE=1
# The folders too: they change when a file goes.
BOOK_SOURCES := _config.yml _toc.yml book/. notebooks/. \
	$(wildcard notebooks/*.ipynb) $(shell find peftlab -name '*.py') \
	$(shell find book -mindepth 1 -not -path '*/__pycache__*' -not -path book/_ext)

.PHONY: help setup book serve test notebooks student models results bench adapterhub \
	colab newest
.DELETE_ON_ERROR:

help:  ## show these commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1|/' \
		| awk -F'|' '{ printf "  %-16s %s\n", $$1, $$2 }'

setup: $(SETUP)  ## make .venv and install everything

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "peftlab needs Python 3.11 or later, and '$(PYTHON)' is older or missing." \
			"Name another: make setup PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "Making .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing peftlab and its tools (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
		-c constraints.txt -e '.[notebooks,book,test,instructor,practice]'
	@touch $@

book: $(BOOK)  ## build the HTML book into _build/html
	@echo "The book is at $(CURDIR)/_build/html/index.html"

# Always from nothing: an incremental build repeats neither the warnings nor the
# side bars of the pages that it leaves alone.
$(BOOK): $(SETUP) $(BOOK_SOURCES)
	@rm -rf _build/html _build/.doctrees
	@mkdir -p _build
	@echo "Building the book"
	@$(BIN)/jupyter-book build . --path-output . -n -W --keep-going -q \
		> _build/book.log 2>&1 || { cat _build/book.log; \
		echo "The book did not build: see the warnings above (also in _build/book.log)."; \
		exit 1; }
	@touch $@

serve: book  ## build the book and serve it on localhost
	@echo "http://localhost:$(PORT)/  (Ctrl-C stops it)"
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

test: book  ## run everything: the notebooks, then the tests
	@rm -rf _build/results
	PEFTLAB_RESULTS=$(CURDIR)/_build/results \
		$(ONE_THREAD) $(OFFLINE) $(BIN)/python -m pytest --nbval --nbval-current-env notebooks \
		-n $(WORKERS) --dist loadfile -p no:cacheprovider --durations=10
	$(ONE_THREAD) $(OFFLINE) $(BIN)/python -m pytest tests \
		-n $(WORKERS) --dist loadfile -p no:cacheprovider --durations=10

notebooks: $(SETUP)  ## run every chapter afresh and store its outputs
	$(BIN)/python tools/notebooks.py

student: $(SETUP)  ## write the sheets and problem sets into _build
	$(BIN)/python tools/student.py

models: $(SETUP)  ## pretrain the small models again from nothing (up to an hour)
	$(BIN)/python -m peftlab.kit.pretrain

results: $(SETUP)  ## run the long sweeps again (eight hours)
	$(BIN)/python -m experiments.run $(ONLY)

bench: $(SETUP)  ## time all beside peft and bitsandbytes (half an hour, quiet machine)
	$(OFFLINE) $(BIN)/python -m experiments.benches.methods
	$(OFFLINE) $(BIN)/python -m experiments.benches.quantization
	$(OFFLINE) $(BIN)/python -m experiments.benches.adapter_latency
	$(OFFLINE) $(BIN)/python -m experiments.benches.int8_linear

adapterhub: $(HUB)/.setup-done  ## compare adapter.py with the adapters library
	@$(ONE_THREAD) $(OFFLINE) $(HUB)/bin/python tools/adapterhub.py $(if $(STORE),--store)

colab: $(COLAB)/.setup-done  ## run each chapter alone, as Colab does, with its versions
	@$(COLAB)/bin/python tools/environments.py $(ONLY)

$(COLAB)/.setup-done: tools/colab.txt
	@test -x $(COLAB)/bin/python || { echo "Making $(COLAB)"; $(COLAB_PYTHON) -m venv $(COLAB); }
	@echo "Installing Colab's versions (several minutes and GB the first time)"
	@$(COLAB)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
		-r tools/colab.txt
	@touch $@

newest:  ## the same with the newest release of everything
	@test -x $(NEWEST)/bin/python || { echo "Making $(NEWEST)"; $(PYTHON) -m venv $(NEWEST); }
	@echo "Installing the newest releases (several minutes and GB the first time)"
	@$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
		--upgrade --upgrade-strategy eager '.[notebooks,quantization]'
	@$(NEWEST)/bin/python tools/environments.py $(ONLY)

$(HUB)/.setup-done: tools/adapterhub.txt
	@test -x $(HUB)/bin/python || { echo "Making $(HUB)"; $(PYTHON) -m venv $(HUB); }
	@echo "Installing the adapters library (a minute the first time)"
	@$(HUB)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
		-r tools/adapterhub.txt
	@touch $@
