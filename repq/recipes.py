"Recipes: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.training.methods import *
from repq.training.recipes import *
from repq.training.requests import *
from repq.networks.one_call import load_state
