"Networks by name: the name under which users import the chapters below"
from repq.networks.models import *
