"""ONNX and other files for devices: the name under which users import the chapters below, and the function that writes a file of any kind

The module can be called: after `import repq`, `repq.export(model, 'model.onnx', images)` is `repq.export.export(...)`."""
# ruff: noqa: F401, F403, F405
import sys as _sys, warnings as _warnings
from inspect import signature as _signature
from repq.networks.costs import *
from repq.deploy.targets import *
from repq.deploy.onnx_writer import *
from repq.deploy.onnx_operations import *
from repq.deploy.tflite_writer import *
from repq.deploy.tflite_operations import *
from repq.deploy.export import *
from repq.deploy.comparison import *
from repq.deploy.tflite import *
from repq.deploy.qonnx_writer import *
from repq.deploy.torch_writer import *
from repq.deploy.openvino_writer import *
from repq.deploy.openvino import *
from repq.deploy.runtimes import *
from repq.deploy.executorch import *
from repq.deploy.integer_network import IntegerNetwork
from repq.deploy.integer_files import load_integers, save_integers
from repq.deploy.integers import to_integer

def export(model, path, images, profile='integers', overwrite=True):
    "`repq.deployment.export_model`: write the deployed `model` to a file, .onnx, .tflite, .pte, .qonnx, .pt2 or .safetensors"
    with _warnings.catch_warnings(): # it brings data and training, and with them fastai, which calls what torch deprecates
        _warnings.simplefilter('ignore')
        from repq.commands.deployment import export_model
    return export_model(model, path, images, profile, overwrite)

class _Callable(type(_sys)):
    def __call__(self, *args, **kwargs): return export(*args, **kwargs)

_sys.modules[__name__].__class__, __signature__ = _Callable, _signature(export)
