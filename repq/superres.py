"Super-resolution: the name under which users import the chapters below"
from repq.training.pairs import *
from repq.training.superres import *
