"Blocks, their operations, and those that were published: the name under which users import the chapters below"
from repq.method.operations import *
from repq.method.blocks import *
from repq.method.published import *
