"Activations, products, shapes and averages in integers, islands in floats, several inputs and outputs: files equal the reference, which is the model."
import pytest, torch, torch.nn.functional as F
from torch import nn
from repq.deploy.integers import tensors_of
from repq.deploy.comparison import compare_file
from repq.deploy.onnx_writer import onnx_model
from repq.integers import check_integers, load_integers, save_integers, to_integer
from repq.surgery import calibrate, quantize

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
FRESH = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))

class Between(nn.Module):
    "A function between two convolutions"
    def __init__(self, f, channels=8):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(channels, 4, 1), f
    def forward(self, x): return self.b(self.f(self.a(x)))

def ready(m, *x): return calibrate(quantize(m, verbose=False), [x if len(x) > 1 else x[0]]).eval()

def check(m, *x, islands=False):
    "The integers are the model, and ONNX Runtime computes them, on another number of images too"
    x = x or (X,)
    if len(x) == 1: calibrate(m, x) # batch norms see what those of the quantized copy see
    net = to_integer(ready(m, *x), x)
    for a, b in zip(tensors_of(net(*x)), tensors_of(m.eval()(*x)), strict=True): assert a.shape == b.shape and (a - b).norm() < .1*b.norm()
    assert any(s.op == 'float' for s in net.steps) == islands
    res = compare_file(net, onnx_model(net, x), tuple(FRESH[:, :v.shape[1]] for v in x))
    assert res['differing'] == 0 and (res['island_error'] or 0) < 1e-5
    return net

@pytest.mark.parametrize('f', [F.silu, F.hardswish, F.gelu, torch.sigmoid, F.hardsigmoid, torch.tanh, nn.ELU(.5), F.selu, F.celu, F.mish, nn.PReLU(8), nn.LeakyReLU(.2), F.softplus, F.relu6, nn.Hardtanh(-.5, .7),
                               torch.exp, torch.abs, lambda x: x.square(), lambda x: 1 - x/3 + 2*x, lambda x: x.clamp(-.3, .4), lambda x: F.relu(x)**2, nn.GELU('tanh'), nn.Softshrink(.1)])
def test_functions_of_one_value(f): check(Between(f))

def se(x): return x*x.mean((2, 3), keepdim=True).sigmoid()
def shuffled(x): b, c, h, w = x.shape; return x.view(b, 2, c//2, h, w).transpose(1, 2).reshape(b, c, h, w)
def swapped(x): a, b = x.chunk(2, 1); return torch.cat([b, a*a], 1)
def parts(x): a, b = torch.split(x, [3, 5], dim=1); return torch.cat([b - 1, a], 1)
def windows(x): b, c, h, w = x.shape; x = x.view(b, c, h//4, 4, w//4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4, c); return x.view(b, h//4, w//4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
def stacked(x): return torch.stack([x, x.flip(3)], 2).amax(2)
def tokens(x): return x.flatten(2).transpose(1, 2).mean(1)[:, :, None, None]

@pytest.mark.parametrize('f', [se, shuffled, swapped, parts, windows, stacked, tokens, lambda x: x.roll((1, -2), (2, 3)), lambda x: F.pad(x, (1, 2, 0, 1)), nn.ReflectionPad2d(1), nn.ChannelShuffle(4), nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)), lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 3), 3),
                               lambda x: x[:, :, ::2, 1:], lambda x: F.adaptive_avg_pool2d(x, (5, 7)), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(3, 2, ceil_mode=True), nn.AdaptiveMaxPool2d(1),
                               lambda x: F.interpolate(x, scale_factor=2, mode='bilinear'), lambda x: F.interpolate(x, size=11, mode='bicubic'), lambda x: F.interpolate(x, size=(5, 17), mode='bilinear', antialias=True),
                               lambda x: x[:, :, None].expand(-1, -1, 1, -1, -1).mean((2, 3), keepdim=True).squeeze(3), lambda x: F.interpolate(x, size=x.shape[-1] + 5), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), lambda x: x.mean(3, keepdim=True), lambda x: x - x.flip(2)])
def test_products_shapes_and_averages(f): check(Between(f))

class Wave(nn.Module):
    "A function between two convolutions of signals"
    def __init__(self, f):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.f = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 1), f
    def forward(self, x): return self.b(self.f(self.a(x)))

@pytest.mark.parametrize('f', [nn.MaxPool1d(3, 2, 1), nn.MaxPool1d(2, ceil_mode=True), lambda x: F.max_pool1d(x, 3, 1, 1, 1), nn.AvgPool1d(4), nn.AvgPool1d(3, 2, 1), nn.AvgPool1d(3, 2, 1, count_include_pad=False),
                               nn.AvgPool1d(2, ceil_mode=True), nn.AdaptiveAvgPool1d(5), nn.AdaptiveAvgPool1d(1), nn.AdaptiveMaxPool1d(1), nn.Upsample(scale_factor=2), lambda x: F.interpolate(x, scale_factor=2, mode='linear'),
                               lambda x: F.interpolate(x, size=20), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.MaxPool1d(2)), nn.ReflectionPad1d(2), nn.PReLU(8)])
def test_signals(f, tmp_path):
    "Pools and enlargements of signals are those of maps of height 1"
    x, fresh = (torch.randn(n, 3, 13, generator=torch.Generator().manual_seed(n)) for n in (4, 3))
    m = Wave(f)
    calibrate(m, [x])
    net = to_integer(ready(m, x), x)
    assert not any(s.op == 'float' for s in net.steps)
    got, want = net(x), m.eval()(x)
    assert got.shape == want.shape and (got - want).norm() < .1*want.norm()
    assert compare_file(net, onnx_model(net, x), (fresh,))['differing'] == 0
    save_integers(net, tmp_path/'net.safetensors')
    assert torch.equal(load_integers(tmp_path/'net.safetensors')(x), got)

class Attention(nn.Module):
    def __init__(self): super().__init__(); self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
    def forward(self, x):
        b, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(y)).reshape(b, h*w, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = y + self.out(((q @ k.transpose(-2, -1)*.5).softmax(-1) @ v).transpose(1, 2).reshape(b, h*w, c))
        return y.transpose(1, 2).reshape(b, c, h, w)

def own(x): return own_operation(x)
def own_operation(x): return x.cumsum(1)/4
torch.fx.wrap('own_operation')

@pytest.mark.parametrize('f', [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), lambda x: x.softmax(1), lambda x: F.normalize(x),
    Attention(), own, nn.ConvTranspose2d(8, 8, 2, 2, dilation=2)])
def test_islands(f, tmp_path):
    net = check(Between(f), islands=True)
    assert check_integers(ready(Between(f), X), X)
    if f is own:
        with pytest.raises(ValueError, match='own_operation, which is no function of torch'): save_integers(net, tmp_path/'net.safetensors')
        return
    save_integers(net, tmp_path/'net.safetensors')
    for a, b in zip(tensors_of(load_integers(tmp_path/'net.safetensors')(X)), tensors_of(net(X))): assert torch.equal(a, b)

@pytest.mark.parametrize('profile', ['integers', 'packed'])
def test_one_opset(profile):
    "`fold` has a form from opset 18 on, and so have maxima with their axes as inputs: what was exported before is written for the same one"
    def tiles(x): return F.fold(F.normalize(F.unfold(x, 2, stride=2)).softmax(1), x.shape[2:], 2, stride=2)
    class Late(Between):
        def forward(self, x): return F.normalize(super().forward(x).amax(1, keepdim=True).expand(-1, 4, -1, -1) + self.b(self.a(x)))
    for m in Between(tiles), Late(nn.GroupNorm(2, 8)):
        net = to_integer(ready(m, X), X)
        proto = onnx_model(net, X, profile)
        assert proto.opset_import[0].version == (21 if profile == 'packed' else 18)
        res = compare_file(net, proto, (FRESH,))
        assert res['differing'] == 0 and res['island_error'] < 1e-5

def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(0); self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        def forward(self, x, y):
            x, y = self.a(x), F.silu(self.a(y))
            return dict(out=self.b(x + y), aux=(x, [self.b(y)]))
    net = check(Two(), X, X.flip(0))
    save_integers(net, tmp_path/'net.safetensors')
    again = load_integers(tmp_path/'net.safetensors')(X, X)
    assert type(again['aux']) is tuple and torch.equal(again['aux'][1][0], net(X, X)['aux'][1][0])
