"The command line: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.commands.progress import *
from repq.commands.app import *
from repq.commands.train_commands import *
from repq.commands.bench_commands import *
from repq.commands.cli import *

if __name__ == '__main__': main()
