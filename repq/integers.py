"The integer network: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.deploy.integer_grids import *
from repq.deploy.integer_ops import *
from repq.deploy.basic_ops import *
from repq.deploy.tables import *
from repq.deploy.shapes import *
from repq.deploy.islands import *
from repq.deploy.integer_network import *
from repq.networks.packing import *
from repq.deploy.integer_files import *
from repq.deploy.sizes import *
from repq.deploy.lowering import *
from repq.deploy.integers import *
from repq.deploy.agreement import *
