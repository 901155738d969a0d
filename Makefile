# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv and install pinned versions first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR := runs/demo
TINY_SD_DIR := runs/tiny_sd
SD_DEMO_DIR := runs/demo-sd

.PHONY: demo demo-sd test test-slow gpu-check results clean

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing pinned packages into $(VENV): a minute or more, most of it for torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# How many steps the methods save on the bundled digits with their classes: three arms, three seeds, two runs at a time, one report. A second
# call finds the finished runs and only writes the report again.
demo: $(VENV)/installed
	$(BIN)/python scripts/compare.py --task digits classes --seeds 0 1 2 --jobs 2 --open --output_dir $(DEMO_DIR) \
	  --methods baseline immiscible_within best -- --max_train_steps 240 --eval_steps 60 --eval_samples 250

# Stable Diffusion end to end, tiny: a checkpoint and data made from installed photographs, latents cached, baseline and assignment with two
# seeds from random weights, and then fine-tuning of what the first baseline became. Two reports, six minutes on two idle cores.
demo-sd: $(TINY_SD_DIR)/classes
	@echo "Latents to disk, four runs from random weights, a report; latents to disk, four runs of fine-tuning, a report: some six minutes"
	$(BIN)/python scripts/precompute_latents.py --config configs/tasks/sd_tiny.yaml
	$(BIN)/python scripts/compare.py --script train_text_to_image.py --task sd_tiny --methods baseline immiscible --seeds 0 1 --jobs 2 --open \
	  --output_dir $(SD_DEMO_DIR)/scratch
	$(BIN)/python scripts/precompute_latents.py --config configs/tasks/sd_tiny_finetune.yaml
	$(BIN)/python scripts/compare.py --script finetune_sd.py --task sd_tiny_finetune --methods baseline immiscible --seeds 0 1 --jobs 2 --open \
	  --output_dir $(SD_DEMO_DIR)/finetune
	@echo "A demonstration that the parts work, not a result (docs/RESULTS.md has those). Reports: $(SD_DEMO_DIR)/scratch/report.html"
	@echo "and $(SD_DEMO_DIR)/finetune/report.html. For commands of your own: source $(VENV)/bin/activate"

$(TINY_SD_DIR)/classes: | $(VENV)/installed
	$(BIN)/python scripts/make_tiny_sd.py $(TINY_SD_DIR)

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

# Kill-and-resume at 20 random points on one and on two processes, and the other long tests.
test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

# On a machine with a CUDA device: what runs on it against the CPU, and its benchmarks, into benchmarks/. Without one it says what it would run.
gpu-check: $(VENV)/installed
	$(BIN)/python scripts/gpu_check.py $(GPU_CHECK)

# Every run behind docs/RESULTS.md: a day of one core, and it says so first; continues where it was stopped.
results: $(VENV)/installed
	PYTHON=$(BIN)/python bash scripts/results.sh

# What these commands made; other runs under runs/ stay.
clean:
	rm -rf $(VENV) $(DEMO_DIR) $(TINY_SD_DIR) $(SD_DEMO_DIR) .mypy_cache .ruff_cache .pytest_cache
