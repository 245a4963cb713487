"Grids, MinError and LSQ: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.method.grids import *
from repq.method.minerror import *
from repq.method.quantizers import *
from repq.method.peeled import *
