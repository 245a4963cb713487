"Runs: the name under which users import the chapters below"
from repq.training.runs import *
from repq.networks.schemas import read_json
