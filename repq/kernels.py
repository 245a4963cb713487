"Convolutions as values: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.method.kernels import *
from repq.method.impulses import *
