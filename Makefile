# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/demo
BIN := $(VENV)/bin
# glibc hands out memory in pages of 2 MiB, which a step fills faster:
# benchmarks/README.md, "Where the time was".
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow wheel lint format clean

demo: $(INSTALLED)
	$(BIN)/python main.py --config=configs/toybirds.py --workdir=$(WORKDIR)

# Two workers, a file to each: most of the time is compilation on one core.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs

slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow -rs

# The wheel, without any extra, away from the clone.
wheel: $(INSTALLED)
	rm -rf build
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w build/wheel .
	$(PYTHON) -m venv build/lean
	build/lean/bin/pip install -q --disable-pip-version-check \
	  -c constraints.txt build/wheel/*.whl
	$(BIN)/python -m tests.saved_runs build/run
	cp tests/check_wheel.py build
	mkdir build/elsewhere
	cd build/elsewhere && ../lean/bin/python ../check_wheel.py ../run

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): setup.cfg constraints.txt
	@echo 'installing into $(VENV), which takes a minute or two'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check \
	  -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) .compilation_cache build *.egg-info .pytest_cache .ruff_cache
