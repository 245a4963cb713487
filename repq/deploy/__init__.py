"""Deployment: whole numbers, and files of them

The package can be called: `repq.deploy(model)` is `repq.surgery.deploy(model)`, whatever was imported before."""
import sys as _sys

class _Callable(type(_sys)):
    def __call__(self, model, inplace=False, verbose=True):
        "`repq.surgery.deploy`: a copy of `model` for inference"
        from repq.networks.surgery import deploy
        return deploy(model, inplace, verbose)

_sys.modules[__name__].__class__ = _Callable
