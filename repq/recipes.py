"Recipes: the name under which users import the chapters below"
from repq.training.recipes import *
