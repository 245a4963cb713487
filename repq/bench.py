"Benchmarks: the name under which users import the chapters below"
from repq.commands.bench import *
