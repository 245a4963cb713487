"Batch norms and their statistics: the name under which users import the chapters below"
from repq.method.batchnorm import *
