"Tables and pictures: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.training.results import *
from repq.training.paper import *
from repq.training.drawing import *
from repq.training.layer_plots import *
from repq.training.plots import *
