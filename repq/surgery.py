"The verbs, and what they rest on: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.networks.sites import *
from repq.networks.changes import *
from repq.networks.reparametrization import *
from repq.networks.surgery import *
from repq.networks.calibration import *
from repq.networks.sums import *
from repq.networks.graphs import trace_graph
from repq.networks.adoption import *
from repq.networks.original_names import *
from repq.networks.one_call import prepare
