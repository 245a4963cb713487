"Graphs of models, and what their nodes compute: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.networks.liveness import *
from repq.networks.in_place import *
from repq.networks.graphs import *
from repq.networks.readers import *
from repq.networks.further_readers import *
