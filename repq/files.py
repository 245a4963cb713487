"What is read and written: the name under which users import the chapters below"
from repq.networks.schemas import *
from repq.networks.files import *
