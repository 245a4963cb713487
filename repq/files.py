"What is read and written: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.networks.schemas import *
from repq.networks.locks import *
from repq.networks.files import *
