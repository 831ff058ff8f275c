# The few commands a person needs. Each does its own set-up, in a .venv in this folder.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
# Kernels are also compiled by the Triton that pairs with torch 2.11; the newest is pinned in constraints.txt.
ifeq ($(shell uname),Linux)
SECOND_TRITON := build/triton-3.6
endif

.PHONY: setup demo test test-peft lint bench paper gpu tune clean

setup: .venv/.installed $(SECOND_TRITON:=/.installed)

# Torch comes first, since the extension is built against it.
.venv/.installed: constraints.txt pyproject.toml setup.py $(shell find csrc -type f)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test,lint]'
	touch $@

%/triton-3.6/.installed: | .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==3.6.0
	touch $@

demo: setup
	$(BIN)/adalora-kernels demo

test: setup
	ADALORA_SECOND_TRITON=$(SECOND_TRITON) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# PEFT's own AdaLoRA tests with and without the patch, and ours under these PEFTs, each in build/peft-<version>.
PEFTS ?= 0.18.1 0.20.0 newest
test-peft: setup
	$(BIN)/python -m tests.peft_suite --jobs $(JOBS) $(PEFTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks

# The paper's methods on tasks that need no hub, in paper-runs; begun again, it goes on where it was cut off.
paper: setup
	$(BIN)/python -m benchmarks.paper stand-ins

# Beside the sources, by the machine's own torch and nvcc; the layer's GPU kernels do without it where it can't be built.
EXTENSION := adalora_kernels/_C.abi3.so
$(EXTENSION): setup.py $(shell find csrc -type f)
	-$(PYTHON) setup.py -q build_ext --inplace

# On a machine with a GPU, with its own python3 and packages. DRY=1 interprets tiny shapes; PART=i/n is a share of the
# full sweep, PART=steps whole training steps, PART=questions what decides between designs, PART=sanitizer the small
# shapes under compute-sanitizer. Records go to OUT, by default benchmarks/results, from where earlier ones are read too;
# nothing is begun after SECONDS.
OF_PROJECT = $(DRY)$(filter table,$(PART))
ON_GPU = $(if $(OF_PROJECT),$(BIN)/python,$(PYTHON))
TOLD = $(if $(DRY),--dry) $(if $(PART),--part $(PART)) $(if $(OUT),--results $(OUT)) $(if $(SECONDS),--seconds $(SECONDS))
gpu: $(if $(OF_PROJECT),setup,$(EXTENSION))
	$(ON_GPU) -m benchmarks.gpu $(TOLD)

# Writes adalora_kernels/backends/triton/measured.json, and to OUT, by which plans and tiles are chosen on such a device.
# PART=i/n is a share of the kernels, PART=table the table alone, from what is recorded and on any machine.
tune: $(if $(OF_PROJECT),setup,$(EXTENSION))
	$(ON_GPU) -m benchmarks.tune $(TOLD)

clean:
	rm -rf .venv build dist *.egg-info demo-output adalora_kernels/*.so
