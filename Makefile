# Thin fronts over scripts/, for people who like make. `make test ARGUMENTS="-k trie"` passes arguments on.
.PHONY: help demo test check breaks bench gpu docs clean

help:           ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

demo:           ## the main job on the bundled graph and a small language model
	@sh scripts/demo $(ARGUMENTS)

test:           ## the fast tests
	@sh scripts/test $(ARGUMENTS)

check:          ## style, types, imports
	@sh scripts/check

breaks:         ## every law of tests/laws must turn red when its seeded break is put in
	@sh scripts/breaks $(ARGUMENTS)

bench:          ## speed beside the published recipe and others, in one run; ARGUMENTS=--quick for a short form
	@sh scripts/bench $(ARGUMENTS)

gpu:            ## on an NVIDIA GPU: train WN18RR, measure it, append to docs/results.md; ARGUMENTS=--dry tries the way on a CPU
	@sh scripts/gpu $(ARGUMENTS)

docs:           ## write docs/configuration.md anew from the settings
	@sh scripts/docs

clean:          ## remove what setting up and testing left behind (not runs/)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .coverage
