# make demo   personalize the embedded model from one image; pictures and timings in outputs/demo/
# make test   run the tests; make test-slow runs the long ones
# make fuzz   read 20,000 damaged files of every kind (ARGS="--seed N --count N")
# make faults   kill, stop, fill disks, damage checkpoints, meet others in a folder; make kills ARGS="--kills 150" kills alone
# make ui     serve the web page and the APIs of A1111 and OpenAI on http://127.0.0.1:7860 (ARGS="--models DIR --adapters DIR")
# Each target but help and clean first creates .venv and installs its requirements.  The other targets run one program each:
#   make tune IMAGE=photo.png (into outputs/tune/photo), train-encoder, compare, verify-pytorch, bench; install, lint, format
#   make pocket   make the embedded model from nothing, on a GPU; ARGS="scale=0.01 minutes=4" does it in small on two cores
#   make gpu    measure the GPU table in at most 8 minutes, into outputs/gpu (ACCEL=cuda)
#   make aot TOPOLOGY=v5e:2x2   what each chip of a TPU needs for a step of CONFIG; no TPU is needed
#   make test-tpu   compile every recipe with a tiny model for v5e:2x2
#   make test-ui   test the page in a browser; as root it installs Debian's chromium if none is found
#   make clean  removes .venv, build and *.egg-info, and keeps outputs/
#   MODEL   pocket, a diffusers folder, a single file or a hub id        IMAGE   one photo
#   DATA    pocketland, or a folder of images                            CONFIG  a recipe in configs/
#   INIT    for tune: a folder or hub id with the encoder, if MODEL has none
#   ARGS    more a.b=value overrides, or --flags of the program          ACCEL   cpu, cuda or tpu

ACCEL ?= cpu
TOPOLOGY ?= v5e:2x2
MODEL ?= pocket
DATA ?= pocketland
CONFIG ?=
IMAGE ?=
INIT ?=
ARGS ?=
PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13,$(shell command -v python$(version))) python3)

PY := .venv/bin/python
CORE := .venv/installed-$(ACCEL)
LINT := .venv/installed-lint
UI := .venv/installed-ui
TEST := .venv/installed-test
BROWSER := .venv/installed-test-ui
TPU := .venv-tpu/installed

# A run that would fall back to the CPU stops: sdjax/runtime/accelerator.py.
demo ui train-encoder tune compare bench: export ACCEL := $(ACCEL)

ifeq ($(filter $(ACCEL),cpu cuda tpu),)
$(error ACCEL=$(ACCEL): expected cpu, cuda or tpu)
endif

.PHONY: help install demo ui test test-slow fuzz faults kills audit test-ui page-figures pocket train-encoder tune compare verify-pytorch bench \
	gpu aot test-tpu lint format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(CORE)

demo: $(CORE)
	$(PY) sample/demo.py --model "$(MODEL)" --out outputs/demo $(ARGS)

ui: $(UI)
	$(PY) -m sdjax ui --model "$(MODEL)" $(ARGS)

test: $(TEST)
	$(PY) -m pytest $(ARGS)

test-slow: $(TEST)
	$(PY) -m pytest -m slow $(ARGS)

fuzz: $(TEST)
	$(PY) tests/fuzz/run.py $(ARGS)

# Damaged checkpoints, full disks, held folders, signals, clocks: the long tests too, then 60 kills.
FAULTS := tampered full_disk small_disk locks held together signals clock pickle_limits bounds
faults: $(TEST)
	$(PY) -m pytest -m "slow or not slow" $(FAULTS:%=tests/test_%.py) $(ARGS)
	$(PY) tests/faults/kills.py --kills 60

# Goes on where it was stopped; outputs/kills holds how far it is.
kills: $(TEST)
	$(PY) tests/faults/kills.py $(ARGS)

# Asks pip, in its mode of hashes, for the tested set; nothing is installed.
audit: $(CORE)
	$(PY) -m pip install --dry-run --ignore-installed --no-deps --quiet --require-hashes -r constraints.lock
	$(PY) -m pip check

test-ui: $(BROWSER)
	$(PY) -m pytest tests/ui -n 0 $(ARGS)

page-figures: $(BROWSER)
	$(PY) -m pytest tests/ui/figures.py -n 0 $(ARGS)

pocket: $(TEST)
	$(PY) train/make_pocket.py $(ARGS)

train-encoder: CONFIG := $(or $(CONFIG),$(if $(filter pocket,$(MODEL)),configs/pocket/e4t.py,configs/e4t_pretrain.py))
train-encoder: $(CORE)
	$(PY) train/run.py $(CONFIG) "model=$(MODEL)" $(if $(filter pocket,$(MODEL)),vision=) "data.path=$(DATA)" $(ARGS)

tune: CONFIG := $(or $(CONFIG),$(if $(filter pocket,$(MODEL)),configs/pocket/tune.py,configs/e4t_tune.py))
tune: $(CORE)
	@test -n "$(IMAGE)" || { echo "IMAGE is empty: expected a photo, as in make tune IMAGE=photo.png" >&2; exit 2; }
	$(PY) train/run.py $(CONFIG) "model=$(MODEL)" "init=$(or $(INIT),$(MODEL))" "data.path=$(IMAGE)" $(ARGS)

compare: $(TEST)
	$(PY) benchmarks/compare.py --model "$(MODEL)" --out outputs/compare $(ARGS)

verify-pytorch: $(TEST)
	$(PY) benchmarks/verify_pytorch.py --model "$(MODEL)" --out outputs/verify-pytorch $(ARGS)

bench: $(TEST)
	$(PY) benchmarks/bench.py --model "$(MODEL)" $(ARGS)

gpu: $(CORE)
	PYTHONPATH=. $(PY) benchmarks/gpu.py --out outputs/gpu $(ARGS)

aot: CONFIG := $(or $(CONFIG),configs/e4t_pretrain.py)
aot: MODEL := $(if $(filter pocket,$(MODEL)),random:sd15,$(MODEL))
aot: $(TPU)
	.venv-tpu/bin/python benchmarks/aot.py $(CONFIG) --model "$(MODEL)" --topology $(TOPOLOGY) $(ARGS)

test-tpu: $(TPU)
	.venv-tpu/bin/python -m pytest -m tpu -n 0 tests/test_tpu.py $(ARGS)

lint: $(LINT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright

format: $(LINT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv .venv-tpu build *.egg-info

# The environment.  The stamps make the second time instant; a change of the requirements installs again.
# uv is ten times faster than pip, but reads no pip.conf: where it finds nothing, pip does it.

PIP := $(PY) -m pip install --quiet --disable-pip-version-check --prefer-binary -c constraints.txt
define install
$(PIP) uv
@$(PY) -m uv pip install --quiet --python $(PY) -c constraints.txt -e "$(1)" || $(PIP) -e "$(1)"
endef

.venv/bin/python:
	@echo "making .venv with $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and "Python %d.%d: expected 3.11, 3.12 or 3.13 (make PYTHON=/path/to/python3.11 ...)" % v)'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# The import compiles the modules that every start needs, and only those.
$(CORE): setup.py constraints.txt | .venv/bin/python
	@echo "installing what sdjax needs ($(ACCEL))"
	@$(call install,.$(if $(filter cpu,$(ACCEL)),,[$(ACCEL)]))
	@env -u PYTHONDONTWRITEBYTECODE $(PY) -W ignore -c "import flax.linen, grain, optax, orbax.checkpoint, safetensors.numpy, tokenizers" 2>/dev/null
	@touch $@

# Types are those of the packages that sdjax imports, so they come along; torch does not.
$(LINT): $(CORE)
	@echo "installing what the checks need"
	@$(call install,.[lint])
	@touch $@

$(UI): $(CORE)
	@echo "installing what the page and the APIs need"
	@$(call install,.[ui])
	@touch $@

# The browser is the system's, so that nothing but Debian's package is run.
CHROMIUM := apt-get install -y -qq chromium >/dev/null
$(BROWSER): $(CORE)
	@echo "installing what the tests of the page need"
	@$(call install,.[test-ui])
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		$(CHROMIUM) || { apt-get update -qq && $(CHROMIUM); } || \
		{ echo "no chromium: expected one on the path" >&2; exit 2; }
	@touch $@

# libtpu changes what a CPU compiles, so it has an environment of its own.
$(TPU): setup.py constraints.txt
	@echo "installing what compiling for TPUs needs into .venv-tpu"
	@test -x .venv-tpu/bin/python || $(PYTHON) -m venv .venv-tpu
	@.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary -c constraints.txt \
		-e ".[tpu]" "pytest>=8" "pytest-xdist>=3.6"
	@touch $@

# torch comes first and by its exact version, so that a wheel for CPUs at hand is taken before a larger one.
$(TEST): $(CORE)
	@echo "installing what the tests need"
	@$(PY) -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	@$(call install,.[test])
	@touch $@
