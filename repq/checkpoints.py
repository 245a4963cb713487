"Others' checkpoints: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.networks.state_dicts import *
from repq.networks.official import *
from repq.networks.checkpoints import *
