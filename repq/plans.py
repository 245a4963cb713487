"Plans of runs: the name under which users import the chapters below"
from repq.training.plans import *
