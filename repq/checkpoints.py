"Others' checkpoints: the name under which users import the chapters below"
from repq.networks.official import *
from repq.networks.checkpoints import *
