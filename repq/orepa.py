"OREPA: the name under which users import the chapters below"
from repq.method.orepa import *
