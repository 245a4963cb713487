"Images in tar files: the name under which users import the chapters below"
from repq.training.shards import *
