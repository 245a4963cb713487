"Several processes: the name under which users import the chapters below"
from repq.training.parallel import *
