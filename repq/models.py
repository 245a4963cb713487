"Networks by name: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.networks.registry import *
from repq.networks.models import *
