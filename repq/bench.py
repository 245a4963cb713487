"Benchmarks: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.commands.bench import *
from repq.commands.peers import *
from repq.commands.waiting import *
