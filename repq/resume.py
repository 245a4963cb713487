"Checkpoints of a run: the name under which users import the chapters below"
from repq.training.resume import *
from repq.networks.files import naming, writing
