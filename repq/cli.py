"The command line: the name under which users import the chapters below"
from repq.commands.cli import *

if __name__ == '__main__': main()
