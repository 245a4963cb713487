"""Quantization-aware training of re-parametrized networks: what users call, by its own name

`import repq` loads nothing else, not even torch: each name is fetched from its chapter when it is first asked for."""
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec

__version__ = "0.1.0"

_NAMES = dict( # module -> names that it has for users
    surgery = 'prepare adopt reparametrize quantize merge train_merged adapt_statistics calibrate quantize_sums add_norms param_groups',
    blocks = 'Block ConvBlock RepVGGBlock ACBlock DiverseBranchBlock MobileOneBlock QARepVGGBlock RepSRBlock',
    orepa = 'OREPA OREPA1x1 OREPALargeKernel',
    ecb = 'ECB',
    models = 'create_model list_models',
    checkpoints = 'from_official to_official load_official read_checkpoint write_checkpoint',
    deployed = 'save_deployed load_deployed',
    integers = 'check_integers to_integer save_integers load_integers',
    export = 'to_onnx to_tflite to_pt2 onnx_session run_onnx tflite_session run_tflite cost')
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_HOME, 'deploy', 'export'] # these two are also a package and a module, which can be called: `repq.deploy(model)`, `repq.export(model, 'model.onnx', images)`

def __getattr__(name):
    "A user's name, or a module of the package, loaded now"
    if name in _HOME: value = globals()[name] = getattr(_import_module(f'repq.{_HOME[name]}'), name)
    elif name.startswith('_') or _find_spec(f'repq.{name}') is None: raise AttributeError(f'module {__name__!r} has no attribute {name!r}', name=name, obj=_import_module(__name__))
    else: value = _import_module(f'repq.{name}')
    return value

def __dir__(): return sorted({*globals(), *__all__})
