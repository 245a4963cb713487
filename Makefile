# make demo | test | docs | lab | test-wheel: all need only git, Python 3.10 or newer, and make. `make help` lists the rest.
PY   := .venv/bin/python
ARGS ?=
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help env demo test fuzz lint check-export check-clean check-readme test-notebooks test-pytest export readme docs page runtime lab test-wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## make .venv, or bring it up to date with settings.ini
	@sh scripts/venv.sh

demo: env  ## the main job on the embedded data, into runs/demo (options: ARGS="--seed 1 --out runs/demo-1")
	@echo 'repq demo: full-precision runs, then quantized ones from them, one on each core; some minutes. Finished runs in the folder are kept.'
	@.venv/bin/repq demo $(ARGS)
	@echo 'Again, or with other runs beside it: .venv/bin/repq report FOLDER...; other data and models: .venv/bin/repq demo --help'

test: env  ## all that CI runs
	@$(PY) scripts/check.py export clean lint readme notebooks docs pytest

check-export: env  ## are the exported modules in step with the notebooks?
	@$(PY) scripts/check.py export

check-clean: env  ## are the notebooks clean?
	@$(PY) scripts/check.py clean

lint: env  ## what is plainly wrong: unused imports and names, undefined ones (ruff)
	@$(PY) scripts/check.py lint

check-readme: env  ## is README.md in step with nbs/index.ipynb?
	@$(PY) scripts/check.py readme

test-notebooks: env  ## execute every notebook (cells flagged slow or cuda excepted)
	@$(PY) scripts/check.py notebooks

test-pytest: env  ## the tests in tests/ (options: ARGS="-k merge")
	@$(PY) scripts/check.py pytest -- $(ARGS)

fuzz: env  ## try commands on anything at all, for MINUTES=10; what fails is kept in .hypothesis and tried first the next time
	@OMP_NUM_THREADS=1 REPQ_FUZZ=$(or $(MINUTES),10) $(PY) -m pytest tests/test_fuzz.py -q $(ARGS)

export: env  ## write repq/ from the notebooks, and clean them
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean

readme: env  ## write README.md from nbs/index.ipynb
	$(PY) scripts/readme.py

docs: env  ## the site in _docs/, links checked: by Quarto where it is installed, otherwise by a stand-in
	@$(PY) scripts/check.py docs

page: env  ## train the networks of the page that runs in a browser, some minutes, into page/networks
	.venv/bin/python scripts/page.py train $(ARGS)

runtime:  ## fetch onnxruntime-web, which the page that runs needs, into node_modules (needs npm)
	npm install --no-package-lock --ignore-scripts --no-audit --no-fund

lab: env  ## JupyterLab on the notebooks
	GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-10000} .venv/bin/jupyter lab --notebook-dir nbs $(ARGS)

test-wheel: env  ## build sdist and wheel; try the wheel in a clean environment with the newest fastai
	@$(PY) scripts/wheel.py

clean:  ## remove what was built (.venv and runs/ stay)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find repq tests scripts nbs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
