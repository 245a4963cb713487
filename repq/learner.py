"fastai's Learner: the name under which users import the chapters below"
from repq.training.learner import *
