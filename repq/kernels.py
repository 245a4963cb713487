"Convolutions as values: the name under which users import the chapters below"
from repq.method.kernels import *
