"What becomes of a run: the name under which users import the chapters below"
from repq.commands.deployment import *
