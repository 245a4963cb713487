"Tables and pictures: the name under which users import the chapters below"
from repq.training.plots import *
