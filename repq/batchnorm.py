"Batch norms and their statistics: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.method.batchnorm import *
from repq.method.sampling import *
