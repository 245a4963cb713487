"fastai's Learner: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.training.learner import *
from repq.training.oscillation import Dampening, Oscillation, Transitions
