"ONNX: the name under which users import the chapters below"
# ruff: noqa: F401, F403, F405
from repq.networks.costs import *
from repq.deploy.targets import *
from repq.deploy.onnx_writer import *
from repq.deploy.onnx_operations import *
from repq.deploy.export import *
from repq.deploy.integer_network import IntegerNetwork
from repq.deploy.integer_files import load_integers, save_integers
from repq.deploy.integers import to_integer
