"Blocks, their operations, and those that were published: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.method.operations import *
from repq.method.blocks import *
from repq.method.published import *
from repq.method.pieces import *
from repq.method.recent import *
