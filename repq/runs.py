"Runs: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.training.tasks import *
from repq.training.run_folders import *
from repq.training.fitting import *
from repq.training.evaluation import *
from repq.training.runs import *
from repq.training.demo import *
from repq.networks.schemas import read_json
from repq.training.drawing import save as save_picture
