"What users call by `repq.NAME`: names that cost nothing until they are used, and the one call before training."
import importlib.util, os, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import repq
from repq.layers import RepQLayer, is_deployed

ROOT = Path(__file__).resolve().parent.parent

def python(code, **env):
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, timeout=300)
    assert not res.returncode, res.stderr
    return res.stdout.strip()

def test_import_loads_nothing():
    "Neither torch nor a chapter: what is imported beside repq are modules of Python's own."
    new = set(python("import sys, importlib.util; before = set(sys.modules); import repq; print(*(set(sys.modules) - before))").split())
    assert new <= {'repq', 'repq.__init__'}, new

def test_every_name():
    names = [n for n in repq.__all__ if n not in ('deploy', 'export')] # modules that can be called
    assert not [n for n in names if importlib.util.find_spec(f'repq.{n}')] # which an import would put in the place of the function
    assert {'prepare', 'quantize', 'reparametrize', 'calibrate', 'create_model', 'load_deployed', 'Block', 'ACBlock', 'OREPA', 'ECB'} <= set(names)
    for n in names: assert callable(getattr(repq, n)) and getattr(repq, n).__doc__, n
    assert set(repq.__all__) <= set(dir(repq)) and len(set(repq.__all__)) == len(repq.__all__)
    for n in 'surgery', 'runs', 'quantizers': assert getattr(repq, n) is sys.modules[f'repq.{n}']

def test_wrong_name():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"): repq.quantise
    with pytest.raises(ImportError): from repq import quantise # noqa: F401
    assert not hasattr(repq, '_private') and not hasattr(repq, '__wrapped__')

@pytest.mark.parametrize('first', ['import repq', 'from repq.export import to_onnx', 'from repq import export', 'import repq.export', 'from repq import *'])
def test_export_is_a_function_and_a_module(first):
    "In whatever order they are imported."
    said = python(f"{first}\nimport repq, inspect\nfrom repq.export import to_onnx, IntegerNetwork\nassert repq.to_onnx is to_onnx\n"
                  "print(callable(repq.export), *inspect.signature(repq.export).parameters)")
    assert said == 'True model path images profile overwrite'

@pytest.mark.parametrize('first', ['import repq', 'import repq.deploy.export', 'from repq.surgery import deploy', 'from repq import deploy'])
def test_deploy_is_a_function_and_a_package(first):
    said = python(f"{first}\nimport repq, torch\nprint(repr(repq.deploy(torch.nn.Conv2d(3, 4, 1), verbose=False)))\nfrom repq.deploy.export import to_onnx")
    assert said.startswith('Conv2d(3, 4')

def small(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

@pytest.mark.parametrize('block,bits,on', [('RepVGGBlock', 4, ['bound_steps', 'input_noise']), ('OREPA', 4, ['bound_steps']), (None, 4, []), (None, 3, ['bound_steps']),
                                           ('RepVGGBlock', 5, []), ('RepVGGBlock', 3, ['bound_steps', 'centred', 'peel', 'input_noise'])])
def test_what_few_bits_switch_on(block, bits, on, capsys):
    "At 4 bits what leaves -8..7 as it is, which hardware for four bits holds; said, and to be switched off"
    net = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(3)))
    x = torch.randn(4, 32, 8, 8)
    repq.prepare(net, x, bits, bits, block=block, first_last_bits=None)
    said = capsys.readouterr().out
    assert [n for n in ('bound_steps', 'centred', 'peel', 'input_noise') if f'{n}=True' in said] == on
    off = repq.prepare(net, x, bits, bits, block=block, first_last_bits=None, verbose=False, **dict.fromkeys(on, False))
    for m in off.modules():
        if isinstance(m, RepQLayer): assert not (m.input_noise or m.weight_quantizer.bounded or m.weight_quantizer.centred)

@pytest.mark.parametrize('name,kw,said', [('repvgg_a0_tiny', {}, True), ('mobileone_s0_tiny', {}, True), ('ac_resnet18_tiny', {}, False),
                                          ('repvgg_a0_tiny', dict(peel=False), False), ('repvgg_a0_tiny', dict(weight_bits=8), False), ('repvgg_a0_tiny', dict(weight_bits=3), False)])
def test_grids_that_end_before_identities(name, kw, said, capsys):
    "Is it said that weights of a byte lose less, where they do?"
    repq.prepare(repq.create_model(name, 10, 3), torch.randn(8, 3, 8, 8), **kw)
    assert ('centred=True and peel=True' in capsys.readouterr().out.splitlines()[-1]) == said

def test_four_lines(tmp_path, capsys):
    "From a model to a file that a runtime computes as the reference does."
    pytest.importorskip('onnxruntime')
    loader = DataLoader(TensorDataset(torch.randn(40, 3, 8, 8), torch.randint(4, (40,))), batch_size=8)
    model = repq.prepare(small(), loader, block=repq.ACBlock, statistics='estimated')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(l.startswith('prepare: ') for l in lines)
    assert '3 layers' in lines[0] and '2 ACBlock' in lines[0] and '4/4 bits' in lines[1] and '8/8 in 0, 7' in lines[1] and '40 images' in lines[2]
    assert all(m.block.statistics == 'estimated' for m in model.modules() if isinstance(m, RepQLayer) and type(m.block).__name__ == 'ACBlock')
    opt = torch.optim.SGD(repq.param_groups(model, 1e-4), lr=.01)
    for x, y in loader: nn.functional.cross_entropy(model.train()(x), y).backward(); opt.step(); opt.zero_grad()
    deployed = repq.deploy(model)
    assert sum(map(is_deployed, deployed.modules())) == 3
    x = next(iter(loader))[0]
    path = repq.export(model, tmp_path/'model.onnx', loader)
    assert 'equals the integer reference' in capsys.readouterr().out
    assert torch.equal(repq.run_onnx(repq.onnx_session(path), x), repq.to_integer(model, x)(x))

def test_enough_images_and_no_more():
    "A loader is asked once, for as many batches as are needed."
    asked = []
    def endless():
        while True: asked.append(1); yield torch.randn(8, 3, 8, 8), 0
    repq.prepare(small(), endless(), images=20, verbose=False)
    assert len(asked) == 3

class Named(nn.Module):
    def __init__(self): super().__init__(); self.net = small()
    def forward(self, pixel_values, labels=None): return dict(logits=self.net(pixel_values))

def test_dictionaries_and_forward():
    batch = dict(pixel_values=torch.randn(4, 3, 8, 8), labels=torch.zeros(4, dtype=torch.long))
    for loader, kw in (([batch], {}), (batch, {}), ([('a name', batch['pixel_values'])], dict(forward=lambda m, b: m(b[1])))):
        assert sum(isinstance(m, RepQLayer) for m in repq.prepare(Named(), loader, verbose=False, **kw).modules()) == 3

@pytest.mark.parametrize('loader, says', [
    ([], 'empty'), (iter(()), 'empty'), (torch.randn(4, 1, 8, 8), "layer '0' takes 3 channels and gets 1"), ([torch.randn(3, 8, 8)], 'one image without a batch'),
    (torch.full((4, 3, 8, 8), float('inf')), 'not finite'), ([torch.randn(4, 3, 8, 8), torch.full((4, 3, 8, 8), float('nan'))], 'batch 1 of the loader holds values that are not finite'),
    ('images', "got 'images'"), (None, 'got None'), (TensorDataset(torch.randn(4, 3, 8, 8)), 'wrap it'), ([['a', 'b']], 'no tensor'), (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 'uint8'),
    (torch.zeros(0, 3, 8, 8), 'is it a batch'), ((torch.randn(4, 3, 8, 8), torch.zeros(4)), 'belongs into a list')])
def test_bad_loaders(loader, says):
    "Named, and the model stays as it is."
    model = small()
    before, text = {k: v.clone() for k, v in model.state_dict().items()}, str(model)
    with pytest.raises((ValueError, TypeError), match=says.replace('(', r'\(')): repq.prepare(model, loader, block=repq.RepVGGBlock, verbose=False)
    assert str(model) == text and all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and model.training
    assert not any(m._forward_pre_hooks for m in model.modules())

@pytest.mark.parametrize('kw, says', [
    *((dict(images=v), 'images must be a whole number') for v in (0, -1, 1.5, float('nan'), '8', None)), (dict(forward=3), 'forward must be a function'), (dict(weight_bits=17), '2 to 16'), (dict(input_bits=None), '2 to 16'),
    (dict(where=lambda name, module: False), 'no layer is left to quantize'), (dict(block=nn.Conv2d(1, 1, 1)), 'block must be called as RepVGGBlock is'), (dict(block=repq.Block), 'block must be called as RepVGGBlock is'), (dict(block='ACBlok'), 'did you mean ACBlock')])
def test_bad_arguments(kw, says):
    with pytest.raises((ValueError, TypeError), match=says) as e: repq.prepare(small(), torch.randn(4, 3, 8, 8), verbose=False, **kw)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('make, says', [(lambda: 'resnet18', 'model must be an nn.Module'), (lambda: small().to('meta'), 'on the device meta'), (lambda: torch.jit.trace(small().eval(), torch.zeros(1, 3, 8, 8)), 'is TorchScript')])
def test_bad_models(make, says, tmp_path):
    with pytest.raises((ValueError, TypeError), match=says): repq.prepare(make(), torch.randn(4, 3, 8, 8), verbose=False)

def test_bad_exports(tmp_path):
    "Named, and nothing is written."
    x = torch.randn(4, 3, 8, 8)
    model = repq.prepare(small(), x, verbose=False)
    (tmp_path/'theirs.onnx').write_text('theirs')
    for args, says in ((('resnet18', 'a.onnx', x), 'model must be an nn.Module'), ((None, 'a.onnx', x), 'model must be an nn.Module'), ((model, 'a.txt', x), 'the name must end in'), ((model, 'a.onnx', x[:, :1]), 'takes 3 channels'), ((model, 'a.onnx', []), 'empty'),
                       ((model, 'a.onnx', x, 'zzz'), 'profile must be one of'), ((model, 'a.pt2', x, 'vnni'), 'is a profile of ONNX files'), ((model, 'no/a.onnx', x), 'there is no folder'), ((model, 'theirs.onnx', x), 'not made by repq')):
        with pytest.raises((ValueError, TypeError, OSError), match=says): repq.export(args[0], tmp_path/args[1], *args[2:])
    assert [f.name for f in tmp_path.iterdir()] == ['theirs.onnx'] and (tmp_path/'theirs.onnx').read_text() == 'theirs'
