# Everything is installed into .venv and nowhere else; delete it, or `make clean`, to start over.
#
#   make demo          learn where a net should start, and draw the result
#   make test          run the tests          make test ARGS="-m slow"
#   make lint          ruff and mypy          make format   lets ruff mend what it can
#   make docs          build the documentation
#   make bench         run the benchmarks of cost, less than 15 minutes; benchmarks/README.md has the others
#   make learn2learn   add learn2learn to .venv, for comparisons, as `make test` tries to
#
# PYTHON is the interpreter .venv is made from. PIP_FLAGS goes to `pip install`: the plain torch for Linux brings the
# CUDA libraries along, several gigabytes; name the index of its CPU builds here to do without them.

PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
# What `make bench` runs: what needs no data but what packages bring, and takes less than 15 minutes together.
BENCH ?= trainer_overhead maml_speed cost_against_depth cost_against_directions cost_against_size long_runs \
    chunk_choice memory_knobs scaling precision

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench learn2learn clean
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/installed-examples
	.venv/bin/python examples/learned_start.py $(ARGS)
	@test -f outputs/learned_start.png && echo "The picture is $(CURDIR)/outputs/learned_start.png"

test: .venv/installed-test,examples .venv/tried-learn2learn
	.venv/bin/python -m pytest -n auto --dist loadfile $(ARGS)

lint: .venv/installed-lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/installed-lint
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/installed-docs
	.venv/bin/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "Open $(CURDIR)/docs/_build/html/index.html"

bench: .venv/installed-bench
	@for name in $(BENCH); do echo "$$name"; .venv/bin/python benchmarks/*/$$name.py $(ARGS) || exit 1; done

learn2learn: .venv/installed-learn2learn-itself

clean:
	rm -rf .venv build dist *.egg-info docs/_build docs/_generated docs/reference outputs lightning_logs checkpoints
	rm -rf .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `$(call install,ARGUMENTS)` is `pip install ARGUMENTS` on one line of the terminal; where there is none, a line every
# five seconds. The full log is .venv/install.log. awk ends with pip's own exit status.
define install
	@echo "Installing $(1) (log in .venv/install.log)"
	@: > .venv/install.log
	@{ test -t 2 || while sleep 5 > /dev/null; do tail -n 1 .venv/install.log | cut -c 1-70 >&2; done & \
	    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt $(PIP_FLAGS) $(1) \
	    2>&1; status=$$?; kill $$! 2> /dev/null; echo "status $$status"; } | tee .venv/install.log | \
	awk -v tty="$$(test -t 2 && echo 1)" \
	    '/^status /{status = $$2} \
	    tty && /^ *(Collecting|Downloading|Building|Installing) /{printf "\r\033[K%.70s", $$0; fflush()} \
	    END{if (tty) printf "\r\033[K"; exit status}' \
	|| { tail -n 25 .venv/install.log; exit 1; }
endef

# One stamp for each set of extras: a second call installs nothing unless the packaging changed.
.venv/installed-%: .venv/pyvenv.cfg setup.cfg pyproject.toml constraints.txt
	$(call install,-e '.[$*]')
	@touch $@

# learn2learn's C files were generated for older Pythons; build_ext makes Cython write them anew. It is installed
# without its dependencies, which are those of its vision and gym modules; the extra has the others.
.venv/installed-learn2learn-itself: .venv/installed-learn2learn
	$(call install,--no-deps learn2learn --config-settings="--build-option=build_ext")
	@touch $@

# Without it, its tests are skipped. Tried once for each state of the packaging; `make learn2learn` tries again.
.venv/tried-learn2learn: .venv/installed-test,examples
	@$(MAKE) --no-print-directory .venv/installed-learn2learn-itself || \
	    echo "learn2learn could not be installed (above); the tests that compare with it are skipped."
	@touch $@

.venv/pyvenv.cfg:
	@$(PYTHON) -m venv .venv || { rm -f $@; \
	    echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
