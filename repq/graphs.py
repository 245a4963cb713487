"Graphs of models, and what their nodes compute: the name under which users import the chapters below"
from repq.networks.graphs import *
from repq.networks.readers import *
