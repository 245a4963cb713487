"TensorFlow Lite: the bytes of a file without any runtime, and LiteRT's XNNPACK against the integer reference in every value."
import json, sys
from unittest.mock import patch
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from helpers import randomize
from test_islands import Between, Wave, parts, se, shuffled, stacked, swapped, tokens, windows
from test_integers import Mixture
from repq.deploy.integer_grids import Grid
from repq.deploy.integer_network import IntegerNetwork
from repq.deploy.integer_ops import Step
from repq.deploy.tflite import run_tflite, tflite_differences, tflite_session, to_tflite
from repq.deploy.tflite_files import OPERATORS, SCHEMA, TYPES, UNION, decode_tflite, encode_tflite
from repq.deploy.tflite_writer import Form, TFLiteFile, tflite_bytes
from repq.integers import load_integers, to_integer
from repq.models import create_model
from repq.networks.files import SIGNATURE, made_here
from repq.surgery import calibrate, quantize, quantize_sums

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))

class Fire(nn.Module):
    "SqueezeNet's"
    def __init__(self, ins, squeezed, outs):
        super().__init__()
        self.squeeze, self.one, self.three = nn.Conv2d(ins, squeezed, 1), nn.Conv2d(squeezed, outs, 1), nn.Conv2d(squeezed, outs, 3, padding=1)
    def forward(self, x):
        x = self.squeeze(x).relu()
        return torch.cat([self.one(x).relu(), self.three(x).relu()], 1)

def squeezenet(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4, 8), Fire(16, 4, 8), nn.Conv2d(16, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def networks(name):
    if name == 'mixture': return Mixture()
    if name == 'squeezenet': return squeezenet()
    return create_model(name, in_channels=3, **({} if 'sr' in name else dict(num_classes=7)))
NAMES = ['repvgg_a0_tiny', 'ac_resnet18_tiny', 'mobileone_s0_tiny', 'ecbsr_m4c8', 'squeezenet', 'mixture']

def ready(m, x=X, bits=4, sums=False, **kw):
    q = quantize(randomize(m), bits, bits, verbose=False, **kw)
    return calibrate(quantize_sums(q) if sums else q, [x]).eval()

def runtime(): pytest.importorskip('ai_edge_litert.interpreter')

def same(net, x, tmp_path, fresh=None):
    "LiteRT gives the reference"
    (tmp_path/'net.tflite').write_bytes(tflite_bytes(net, x))
    fresh = x if fresh is None else fresh
    got, want = run_tflite(tflite_session(tmp_path/'net.tflite'), fresh), net(*fresh) if isinstance(fresh, tuple) else net(fresh)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True): assert torch.equal(a, b), (a != b).float().mean()

# Bytes

def test_the_schema_is_tensorflows():
    runtime()
    from ai_edge_litert import schema_py_generated as theirs
    data = tflite_bytes(to_integer(ready(networks('mixture')), X), X)
    model = theirs.ModelT.InitFromObj(theirs.Model.GetRootAsModel(data, 0))
    own, graph = decode_tflite(data), model.subgraphs[0]
    assert model.description.decode() == own['description'] and len(graph.tensors) == len(own['subgraphs'][0]['tensors'])
    for o, theirs_o in zip(own['subgraphs'][0]['operators'], graph.operators, strict=True):
        assert list(theirs_o.inputs) == o['inputs'] and theirs_o.builtinOptionsType == o.get('builtin_options_type', 0)
        if 'options' in o: assert type(theirs_o.builtinOptions).__name__ == o['options'] + 'T'
    for name, (code, *_) in OPERATORS.items(): assert getattr(theirs.BuiltinOperator, name) == code
    for name, number in UNION.items(): assert getattr(theirs.BuiltinOptions, name) == number
    for name, number in TYPES.items(): assert getattr(theirs.TensorType, name.upper()) == number
    for table, fields in SCHEMA.items():
        names = {'activation': 'fused_activation_function', 'dilation_w': 'dilation_w_factor', 'dilation_h': 'dilation_h_factor', 'filter_w': 'filter_width',
                 'filter_h': 'filter_height', 'in_type': 'in_data_type', 'out_type': 'out_data_type'}
        title = {'Quantization': 'QuantizationParameters'}.get(table, table)
        for place, field, _ in fields:
            add = getattr(theirs, f'{title}Add{"".join(w.title() for w in names.get(field, field).split("_"))}')
            assert place in add.__code__.co_consts or place == 0, (table, field)

def test_a_file_comes_back():
    data = tflite_bytes(to_integer(ready(networks('mixture')), X), X)
    model = decode_tflite(data)
    assert encode_tflite(model) == data and decode_tflite(encode_tflite(model)) == model
    for b in model['buffers']:
        if 'data' in b: assert any(data[i:i + len(b['data'])] == b['data'] for i in range(0, len(data), 16)) # where kernels read it

@pytest.mark.parametrize('bits', [8, 4, 2])
@pytest.mark.parametrize('name', NAMES)
def test_multipliers_are_the_references(name, bits):
    "What a kernel computes of the scales in float32 is the multiplier of the reference; weights and biases are its integers"
    net = to_integer(ready(networks(name), bits=bits), X)
    model, f = decode_tflite(tflite_bytes(net, X)), np.float32
    graph, steps, grids = model['subgraphs'][0], {s.name: s for s in net.steps}, net.grids
    tensors, seen = graph['tensors'], 0
    scale = lambda i: np.array(tensors[i]['quantization']['scale'], f)
    for o in graph['operators']:
        s = steps.get(tensors[o['outputs'][0]]['name'])
        if s is None or s.op != 'layer' or s.grid is None: continue
        i, w, b = o['inputs']
        p, own = s.params, grids[s.inputs[0]]
        want = abs(torch.tensor(own.step)*p['scale']/torch.tensor(s.grid.step)).numpy()
        assert (scale(i)*scale(w)/scale(o['outputs'][0]) == want).all() and (scale(b) == scale(i)*scale(w)).all()
        stored = [np.frombuffer(model['buffers'][tensors[t]['buffer']]['data'], np.int8 if t == w else np.int32) for t in (w, b)]
        assert abs(stored[0].astype(int)).sum() == abs(p['weight'].numpy().astype(int)*p['room']).sum() and (abs(stored[1]) == abs(p['bias'].numpy())).all()
        seen += 1
    assert seen >= len([s for s in net.steps if s.op == 'layer']) - 1

def test_grids_lie_in_their_bytes():
    for zero, low, high in (0, 0, 255), (0, 0, 15), (8, 0, 15), (128, 0, 255), (5, 0, 15), (5, 2, 9), (0, 3, 9), (200, 0, 255):
        for dtype, shift in ('uint8', 0), ('int8', -128):
            g = Grid(.1, zero + shift, low + shift, high + shift, dtype)
            f = Form.of(g)
            assert f.holds(g) and f.byte(g.high, g) == 127 and float(f.scale).hex().count('p') == 1 and np.frexp(f.scale)[0] == .5
            bottom = {0: max(-128, f.low), 1: f.zero, 2: f.zero - 1/f.scale}[f.activation]
            assert max(bottom, f.low) == f.byte(g.low, g)

def test_metadata_says_what_is_assumed():
    net = to_integer(ready(networks('repvgg_a0_tiny')), X)
    model = decode_tflite(tflite_bytes(net, X))
    meta, = model['metadata']
    said = json.loads(model['buffers'][meta['buffer']]['data'])
    assert meta['name'] == 'repq' and 'XNNPACK' in said['assumes']['runtime'] and said['repq'].startswith('made by repq')
    for s in net.steps:
        if s.grid: assert said['values'][s.name]['step'] == s.grid.step

def test_a_large_file_is_known_as_repqs(tmp_path):
    "The remark that lets --overwrite replace it lies at the beginning, whatever follows"
    g = TFLiteFile({})
    for _ in range(20): g.constant(np.zeros((2000, 50), np.int8), scale=np.ones(2000, np.float32))
    (tmp_path/'a.tflite').write_bytes(g.encoded([], [], dict(repq=SIGNATURE, rest='.'*200_000)))
    assert made_here(tmp_path/'a.tflite')

# Refusals

class Normed(nn.Module):
    def __init__(self, f): super().__init__(); self.a, self.f, self.b = nn.Conv2d(3, 8, 3), f, nn.Conv2d(8, 4, 1)
    def forward(self, x): return self.b(self.f(self.a(x)))

@pytest.mark.parametrize('f, why', [(nn.GroupNorm(2, 8), 'floating point: GroupNorm'), (nn.Softmax(1), 'floating point: Softmax'),
                                    (nn.MaxPool2d(3, 1, dilation=2), 'no dilation, here')])
def test_what_it_cannot_hold_is_named(f, why, tmp_path):
    q = ready(Normed(f))
    with pytest.raises(ValueError, match=rf"cannot be written to TensorFlow Lite: .*{why}") as e: to_tflite(q, tmp_path/'net.tflite', X)
    assert "'f'" in str(e.value) and not list(tmp_path.iterdir())

def test_sums_of_version_0_1_0_are_refused(tmp_path):
    from test_saturation import as_version_1
    x = torch.rand(4, 3, 8, 8)
    old = load_integers(as_version_1(to_integer(ready(networks('ac_resnet18_tiny'), x), x), tmp_path/'old.safetensors'))
    with pytest.raises(ValueError, match='anew'): tflite_bytes(old, x)

@pytest.mark.parametrize('missing, does', [('flatbuffers', lambda q, p: to_tflite(q, p, X)), ('ai_edge_litert', lambda q, p: tflite_session(p))])
def test_missing_packages_say_which_extra(missing, does, tmp_path):
    q = ready(networks('repvgg_a0_tiny'))
    with patch.dict(sys.modules, {missing: None, f'{missing}.interpreter': None}), pytest.raises(ImportError, match=r"repq\[tflite\]"): does(q, tmp_path/'net.tflite')
    assert not list(tmp_path.iterdir())

# LiteRT

@pytest.mark.parametrize('bits', [8, 4, 2])
@pytest.mark.parametrize('name', NAMES)
def test_xnnpack_gives_the_reference(name, bits, tmp_path):
    runtime()
    net = to_tflite(ready(networks(name), bits=bits), tmp_path/'net.tflite', X)
    fresh = torch.randn(3, *X.shape[1:])*1.5
    assert torch.equal(run_tflite(tflite_session(tmp_path/'net.tflite'), fresh), net(fresh))
    different = tflite_differences(net, fresh)
    assert len(different) >= len([s for s in net.steps if s.grid]) and not any(share for share, _ in different.values())

@pytest.mark.parametrize('kw', [dict(centred=True), dict(per_channel=False), dict(sums=True), dict(first_last_bits=2)], ids=str)
@pytest.mark.parametrize('bits', [4, 2])
def test_other_grids(kw, bits, tmp_path):
    runtime()
    for name in 'ac_resnet18_tiny', 'repvgg_a0_tiny': same(to_integer(ready(networks(name), bits=bits, **kw), X), X, tmp_path, torch.randn(2, 3, 12, 12))

FUNCTIONS = [F.silu, torch.tanh, nn.PReLU(8), nn.PReLU(), nn.LeakyReLU(.2), F.relu6, nn.Hardtanh(-.5, .7), torch.abs, lambda x: 1 - x/3 + 2*x, lambda x: x.clamp(-.3, .4), lambda x: x.clamp(.1, 4),
    se, shuffled, swapped, parts, windows, stacked, tokens, lambda x: x.roll((1, -2), (2, 3)), lambda x: F.pad(x, (1, 2, 0, 1)), lambda x: F.pad(x, (1, -2, 0, 1), value=.3), nn.ReflectionPad2d(1), nn.ReplicationPad2d((0, 2, 1, 0)),
    nn.ChannelShuffle(4), lambda x: x[:, :, ::2, 1:], lambda x: F.adaptive_avg_pool2d(x, (5, 7)), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(3, 2, ceil_mode=True), nn.AdaptiveMaxPool2d(1),
    lambda x: F.interpolate(x, scale_factor=2, mode='bilinear'), lambda x: F.interpolate(x, size=x.shape[-1] + 5), lambda x: F.interpolate(x, scale_factor=3), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), lambda x: x.mean(3, keepdim=True),
    lambda x: x - x.flip(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d((3, 1), 1, (1, 0)), lambda x: F.pixel_unshuffle(x, 2).sum(1, keepdim=True).expand(-1, 8, -1, -1), lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 5, 6)]

@pytest.mark.parametrize('f', FUNCTIONS, ids=[str(i) for i in range(len(FUNCTIONS))])
def test_between_two_convolutions(f, tmp_path):
    runtime()
    net = to_integer(ready(Between(f)), X)
    if any(s.op == 'float' for s in net.steps): pytest.skip('an island')
    same(net, X, tmp_path, torch.randn(2, 3, 12, 12))

@pytest.mark.parametrize('conv', [dict(kernel_size=3, stride=2), dict(kernel_size=4, padding=2), dict(kernel_size=3, stride=2, padding=2, dilation=2), dict(kernel_size=(1, 3), padding=(0, 1)),
    dict(kernel_size=3, groups=2, padding=1), dict(kernel_size=3, groups=8, out_channels=24), dict(kernel_size=5, groups=8, padding=2, stride=3, out_channels=8), dict(kernel_size=3, padding=4), dict(kernel_size=1, stride=2),
    dict(kernel_size=3, padding=(2, 1), padding_mode='reflect'), dict(kernel_size=3, padding=1, stride=2, padding_mode='circular'), dict(kernel_size=3, padding=2, padding_mode='replicate'), dict(kernel_size=7, padding=3, dilation=1, out_channels=1)], ids=str)
@pytest.mark.parametrize('bits', [8, 3])
def test_convolutions(conv, bits, tmp_path):
    runtime()
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, **{**dict(out_channels=6), **conv}), nn.ReLU6(), nn.Flatten(1), nn.LazyLinear(5))
    m(X)
    same(to_integer(ready(m, bits=bits), X), X, tmp_path, torch.randn(2, 3, 12, 12)*2)

@pytest.mark.parametrize('f', [nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2), nn.Upsample(scale_factor=2), lambda x: F.interpolate(x, scale_factor=2, mode='linear')], ids=['largest', 'average', 'nearest', 'linear'])
def test_signals(f, tmp_path):
    "Maps of height 1"
    runtime()
    x = torch.randn(4, 3, 13, generator=torch.Generator().manual_seed(0))
    m = Wave(f)
    same(to_integer(ready(m, x, 8), x), x, tmp_path)

def test_several_inputs_and_outputs(tmp_path):
    runtime()
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3), nn.Linear(8, 5)
        def forward(self, x, y):
            z = self.a(x).relu() + self.b(y)
            return self.c(z.mean((2, 3))), z
    x = torch.randn(4, 3, 9, 9), torch.randn(4, 1, 9, 9)
    q = calibrate(quantize(Two(), verbose=False), [x]).eval()
    same(to_integer(q, x), x, tmp_path)

def test_extreme_multipliers(tmp_path):
    "Negative scales, multipliers beyond what XNNPACK takes, the largest sums that int32 has room for"
    runtime()
    own, grid = Grid(1.), Grid(1., 128)
    scale = torch.tensor([-.01, 300., 2.**-40, 1e-7, .5, -1.])
    w = torch.randint(-127, 128, (6, 4), dtype=torch.int8)
    p = dict(weight=w, bits=8, room=1, scale=scale, bias=torch.tensor([0, 1, 2**30, -2**30, -7, 5], dtype=torch.int32))
    net = IntegerNetwork([Step('q', 'quantize', ['x'], own), Step('y', 'layer', ['q'], grid, p), Step('out', 'dequantize', ['y'])], 'x', 'out')
    same(net, torch.randint(0, 256, (64, 4)).float(), tmp_path)
    p['weight'][0, 1:3] = -128 # 128, of which there is no byte
    same(net, torch.randint(0, 256, (64, 4)).float(), tmp_path)

@pytest.mark.parametrize('groups', [1, 2, 4])
def test_weights_that_become_128(groups, tmp_path):
    runtime()
    w = torch.randint(-128, -120, (8, 4//groups, 3, 3), dtype=torch.int8)
    p = dict(weight=w, bits=8, room=1, scale=torch.linspace(-.002, .001, 8), bias=torch.arange(8, dtype=torch.int32), groups=groups, stride=(1, 1), padding=(1, 1), dilation=(1, 1), padding_mode='zeros')
    net = IntegerNetwork([Step('q', 'quantize', ['x'], Grid(1.)), Step('y', 'layer', ['q'], Grid(1., 128), p), Step('out', 'dequantize', ['y'])], 'x', 'out')
    same(net, torch.randint(0, 256, (4, 4, 6, 6)).float(), tmp_path)

def test_floats_next_to_borders_of_rounding(tmp_path):
    "The first grid divides as the reference does: values half-way between two integers and their neighbours"
    runtime()
    for grid in Grid(.1), Grid(.0371), Grid(.3, 8, 0, 15), Grid(.7, 0, 0, 3), Grid(.2, 0, -128, 127, 'int8'):
        half = (torch.arange(-300, 300) + .5)*torch.tensor(grid.step)
        x = torch.cat([half, half.nextafter(torch.tensor(9e9)), half.nextafter(torch.tensor(-9e9))])[None]
        net = IntegerNetwork([Step('q', 'quantize', ['x'], grid), Step('out', 'dequantize', ['q'])], 'x', 'out')
        same(net, x, tmp_path)

@pytest.mark.parametrize('op', ['add', 'mul', 'sub'])
def test_all_pairs_of_bytes(op, tmp_path):
    runtime()
    for a, b, y in (Grid(.03), Grid(.017, 128), Grid(.041, 90)), (Grid(.1, 0, 0, 15), Grid(.02), Grid(.11, 3, 0, 15)):
        net = IntegerNetwork([Step('qa', 'quantize', ['a'], a), Step('qb', 'quantize', ['b'], b), Step('y', op, ['qa', 'qb'], y), Step('out', 'dequantize', ['y'])], ('a', 'b'), 'out')
        pairs = torch.cartesian_prod(torch.arange(a.low, a.high + 1), torch.arange(b.low, b.high + 1))
        same(net, ((pairs[None, :, 0] - a.zero)*a.step, (pairs[None, :, 1] - b.zero)*b.step), tmp_path)

def test_top_1_on_photographs(imagenet_sample, tmp_path):
    runtime()
    from PIL import Image
    files = sorted((imagenet_sample/'val').rglob('*.JPEG')) or sorted(p for p in (imagenet_sample/'val').rglob('*') if p.is_file())
    x = torch.stack([torch.tensor(np.asarray(Image.open(p).convert('RGB').resize((64, 64))), dtype=torch.float32).permute(2, 0, 1)/128 - 1 for p in files])
    for name in 'repvgg_a0_tiny', 'mobileone_s0_tiny':
        net = to_tflite(ready(networks(name), x), tmp_path/f'{name}.tflite', x)
        y, want = run_tflite(tflite_session(tmp_path/f'{name}.tflite'), x), net(x)
        assert torch.equal(y, want) and torch.equal(y.argmax(1), want.argmax(1)) and len(x) == 24

def test_files_that_are_none(tmp_path):
    runtime()
    (tmp_path/'a.tflite').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='cannot be run by LiteRT'): tflite_session(tmp_path/'a.tflite')
    with pytest.raises(FileNotFoundError, match='there is no file'): tflite_session(tmp_path/'b.tflite')
