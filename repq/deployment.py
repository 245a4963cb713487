"What becomes of a run: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.commands.post_training import *
from repq.commands.deployment import *
from repq.commands.run_reports import *
