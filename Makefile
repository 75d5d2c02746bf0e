PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
RUN    ?= runs/fashion_class
CORES  := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
export TRANSFORMERS_VERBOSITY = error
export DIFFUSERS_VERBOSITY = error

.DEFAULT_GOAL := help
.PHONY: help install unlearn unlearn-robust evaluate test test-slow table attack-table robustness-table bench bench-gpu reference embedded-model control unlearn-classifier classifier-table \
	embedded-resnet unlearn-ddpm unlearn-ddpm-robust ddpm-table embedded-ddpm retrained-ddpm demo test-demo quality style clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

install: $(READY) ## create .venv with the tested versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tensorboard]'
	@touch $(READY)

unlearn: $(READY) ## the main job: erase a class from the embedded Stable Diffusion
	$(LAUNCH) train_scripts/unlearn_sd.py --config train_scripts/configs/fashion_class.yaml \
		--output_dir $(RUN) --overwrite_output_dir true

unlearn-robust: $(READY) ## the same so that fine-tuning and learned tokens do not bring it back
	$(LAUNCH) train_scripts/unlearn_sd.py --config train_scripts/configs/fashion_robust.yaml --overwrite_output_dir true

test: $(READY) ## lint, types and all fast tests, in parallel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: $(READY) ## the slow tests as well
	$(BIN)/pytest -n 2

evaluate: $(READY) ## judge what `make unlearn` left, on plain prompts and under attack
	$(BIN)/python train_scripts/evaluate_sd.py --config train_scripts/configs/evaluate_fashion.yaml \
		--overwrite_output_dir true

table: $(READY) ## all rows of the tables in docs/results.md; finished rows are not run again
	$(BIN)/python -m benchmarks.tables --tables classes objectives projection concepts

attack-table: $(READY) ## what attacks bring back after five ways to erase; finished rows are not run again
	$(BIN)/python -m benchmarks.tables --tables attacks --workers 1 --output_dir runs/attack_table

robustness-table: $(READY) ## the same beside a control that never knew, strongest attackers; finished rows are not run again
	$(BIN)/python -m benchmarks.tables --tables robust_classes robustness --workers 1 --output_dir runs/robustness_table

BENCH = $(BIN)/python benchmarks/$(1).py --page docs/performance.md --json docs/tables/$(2).json $(3)

bench: $(READY) ## what the protection costs, measured here; the tables of docs/performance.md (an hour on a quiet CPU)
	$(call BENCH,loss,loss,--targets all)
	$(call BENCH,step,step_lora,--rank 16 --repeats 3)
	$(call BENCH,step,step_full,--repeats 3)
	$(call BENCH,setup,setup,--baseline false --batch_size 1 --repeats 1 --sizes 1 16)
	$(call BENCH,setup,setup_all,--targets all --baseline false --batch_size 1 --repeats 1 --sizes 1 16)
	$(call BENCH,scaling,scaling,--repeats 3)

bench-gpu: $(READY) ## the same on a CUDA GPU, in bf16 and batches of 8 (a quarter of an hour)
	$(call BENCH,loss,gpu_loss,--device cuda --targets all)
	$(call BENCH,loss,gpu_loss_attn2,--device cuda --targets attn2 --ranks [16])
	$(call BENCH,step,gpu_step_lora,--device cuda --rank 16)
	$(call BENCH,step,gpu_step_full,--device cuda)
	$(call BENCH,setup,gpu_setup,--device cuda --targets all --baseline false --repeats 3 --sizes 1 16)

embedded-model: $(READY) ## train everything in assets/ again (Debian package dataset-fashion-mnist needed)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps open-clip-torch
	$(BIN)/python train_scripts/prepare_fashion_mnist.py
	$(LAUNCH) train_scripts/train_classifier.py
	$(LAUNCH) train_scripts/train_text_to_image.py
	$(BIN)/python train_scripts/score_text_to_image.py

CONCEPT ?= dress

control: $(READY) ## the yardstick of robustness: the embedded recipe without CONCEPT (Debian package dataset-fashion-mnist needed)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps open-clip-torch
	test -d runs/fashion_mnist || $(BIN)/python train_scripts/prepare_fashion_mnist.py
	$(LAUNCH) train_scripts/train_text_to_image.py --exclude_concepts '[$(CONCEPT)]' --pretrained_vae assets/fashion_sd/vae \
		--output_dir runs/control_$(CONCEPT) --work_dir runs/control_$(CONCEPT)_work --checkpointing_steps 500 \
		$(if $(wildcard runs/control_$(CONCEPT)_work/unet_training/checkpoints/step-*),--resume_from_checkpoint latest)

unlearn-classifier: $(READY) ## make the embedded image classifier forget a class
	$(LAUNCH) -m classification_ext.unlearn --config classification_ext/configs/fashion_class.yaml --overwrite_output_dir true

classifier-table: $(READY) ## all rows of classification_ext's table; finished rows are not run again
	$(BIN)/python -m benchmarks.tables --tables classifier --workers $(CORES) --output_dir runs/classifier_table

embedded-resnet: $(READY) ## train assets/fashion_resnet again
	$(LAUNCH) -m classification_ext.train --config classification_ext/configs/fashion_train.yaml --overwrite_output_dir true

unlearn-ddpm: $(READY) ## erase a label from the embedded DDPM
	$(LAUNCH) -m ddpm_ext.unlearn --config ddpm_ext/configs/unlearn_fashion.yaml --overwrite_output_dir true

unlearn-ddpm-robust: $(READY) ## the same against relearning and inversion
	$(LAUNCH) -m ddpm_ext.unlearn --config ddpm_ext/configs/robust_fashion.yaml --overwrite_output_dir true

ddpm-table: $(READY) ## all rows of ddpm_ext's table; finished rows are not run again
	$(BIN)/python -m benchmarks.tables --tables ddpm --output_dir runs/ddpm_table

embedded-ddpm: $(READY) ## train assets/fashion_ddpm again and judge it (Debian package dataset-fashion-mnist needed)
	test -d runs/fashion_mnist_labelled || $(BIN)/python train_scripts/prepare_fashion_mnist.py
	$(LAUNCH) -m ddpm_ext.train --config ddpm_ext/configs/train_fashion.yaml --overwrite_output_dir true
	rm -rf assets/fashion_ddpm/checkpoints assets/fashion_ddpm/logs
	$(BIN)/python -m ddpm_ext.evaluate --config ddpm_ext/configs/evaluate_fashion.yaml --overwrite_output_dir true

retrained-ddpm: $(READY) ## the yardstick: a DDPM that never saw a sneaker, judged (same Debian package)
	test -d runs/fashion_mnist_labelled || $(BIN)/python train_scripts/prepare_fashion_mnist.py
	$(LAUNCH) -m ddpm_ext.train --config ddpm_ext/configs/train_fashion.yaml --exclude_labels '[sneaker]' \
	  --output_dir runs/ddpm_retrained --overwrite_output_dir true
	$(BIN)/python -m ddpm_ext.evaluate --config ddpm_ext/configs/evaluate_retrained.yaml --overwrite_output_dir true

reference: $(READY) ## write the settings and API pages in docs/ from the source
	$(BIN)/python docs/write_reference.py

DEMO := .venv-demo

$(DEMO)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	grep -v '^pillow==' constraints.txt > $(DEMO)/constraints.txt
	$(DEMO)/bin/python -m pip install --quiet --constraint $(DEMO)/constraints.txt torch==2.13.0
	$(DEMO)/bin/python -m pip install --quiet --constraint $(DEMO)/constraints.txt --editable '.[demo]' \
		pytest pytest-timeout playwright
	@touch $@

demo: $(DEMO)/.installed ## a page that draws a prompt before and after `make unlearn`, in an environment of its own
	$(DEMO)/bin/barrier-demo $(RUN)

test-demo: $(DEMO)/.installed ## the page in a headless browser (Debian package chromium needed)
	$(DEMO)/bin/python -m pytest tests/test_demo.py

quality: $(READY) ## lint and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(READY) ## format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
