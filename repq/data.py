"Images and loaders: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.training.loader import *
from repq.training.images import *
from repq.training.folders import *
from repq.training.packed import *
from repq.training.data import *
