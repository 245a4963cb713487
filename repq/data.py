"Images and loaders: the name under which users import the chapters below"
from repq.training.loader import *
from repq.training.images import *
from repq.training.folders import *
from repq.training.packed import *
from repq.training.data import *
