"The quantized layer: the name under which users import the chapters below"
from repq.method.layers import *
