"ECB: the name under which users import the chapters below"
from repq.method.ecb import *
