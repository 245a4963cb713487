"The integer network: the name under which users import the chapters below"
from repq.deploy.integers import *
