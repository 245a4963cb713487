"Grids, MinError and LSQ: the name under which users import the chapters below"
from repq.method.grids import *
from repq.method.minerror import *
from repq.method.quantizers import *
