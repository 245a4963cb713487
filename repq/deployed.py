"Deployed models in files: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.deploy.graph_text import *
from repq.deploy.layer_text import *
from repq.deploy.deployed import *
