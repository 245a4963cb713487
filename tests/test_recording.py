"Models that stand-ins cannot go through, and convolutions that pad or compute their weights themselves: to integers, in the file too."
import math, sys
import pytest, torch, torch.nn as nn, torch.nn.functional as F
from repq.deploy.comparison import compare_file
from repq.deploy.integers import to_integer
from repq.deploy.onnx_writer import onnx_model
from repq.method.layers import RepQLayer
from repq.networks.adoption import adopt
from repq.networks.original_names import original_names, original_state_dict
from repq.networks.calibration import calibrate
from repq.networks.graphs import trace_graph
from repq.networks.sums import quantize_sums
from repq.networks.surgery import deploy, quantize

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)

class Sizes(nn.Module):
    "Decides by sizes, in several ways; a batch norm follows a convolution all the same"
    def __init__(self, way): super().__init__(); self.way, self.a, self.bn, self.b = way, nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    def forward(self, x): return self.b(self.way(self.bn(self.a(x))).relu())

def ceils(x): return F.pad(x, (0, math.ceil(x.shape[3]/3)*3 - x.shape[3], 0, 0))
def asks(x): return F.avg_pool2d(x, 2) if x.shape[2] > 8 else x
def loops(x): return torch.cat([row.unsqueeze(2) for row in x.unbind(2)][::-1], 2)
def wants_a_tensor(x):
    if not isinstance(x, torch.Tensor): raise TypeError
    return x*2
def windows(x):
    B, C, H, W = x.shape
    y = x.view(B, C, H//4, 4, W//4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, C, 4, 4)
    return (y - y.mean((2, 3), keepdim=True)).view(int(len(y)/(H*W/16)), H//4, W//4, C, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)

def differing(net, x): return compare_file(net, onnx_model(net, x), (torch.cat([-x[:1], x]),))

@pytest.mark.parametrize('way', [ceils, asks, loops, wants_a_tensor, windows])
def test_what_decides_by_sizes_becomes_integers(way):
    m = Sizes(way).eval()
    answered = way is wants_a_tensor and sys.version_info >= (3, 11) # by a stand-in
    if way in (asks, wants_a_tensor, windows) and not answered:
        with pytest.raises(Exception): trace_graph(m, False)
    calibrate(m, [X])
    q = calibrate(quantize(m, 8, 8, verbose=False), [X]).eval()
    net = to_integer(q, X)
    assert (net.fixed or answered) and 'bn' not in [s.name for s in net.steps] # absorbed
    assert (net(X) - m(X)).norm() < .05*m(X).norm() and differing(net, X)['differing'] == 0

def test_sizes_are_given_to_quantize_or_seen_by_calibrate_and_kept_by_copies():
    q = quantize(Sizes(asks).eval(), 8, 8, verbose=False, example_input=X)
    assert q.repq_sizes == ((3, 16, 16),)
    d = deploy(calibrate(q, [(X, torch.zeros(4))]), verbose=False)
    assert isinstance(d.bn, nn.Identity) and d.repq_sizes == q.repq_sizes

def test_no_forward_is_written_for_one_size():
    class Branches(Sizes):
        def __init__(self): super().__init__(asks); self.c = nn.Conv2d(3, 8, 1)
        def forward(self, x): return self.b(asks(self.a(x) + self.c(x)))
    with pytest.warns(UserWarning, match='right for no other'): m = adopt(Branches(), X, verbose=False) # its branches stay
    assert m.c.weight.shape == (8, 3, 1, 1)
    q = calibrate(quantize(m, 8, 8, verbose=False, adopt=False), [X])
    with pytest.raises(ValueError, match='right for no other'): quantize_sums(q)
    for x in X, X[..., :8, :8]: assert (q.eval()(x) - m.eval()(x)).norm() < .2*m(x).norm() # the crop is not pooled, and clipped
    assert to_integer(q, X).fixed

def test_without_sizes_it_is_said(capsys):
    quantize(Sizes(asks), 8, 8)
    assert 'cannot be traced' in capsys.readouterr().out

class Same(nn.Conv2d):
    "As TensorFlow pads"
    def forward(self, x):
        (h, w), (kh, kw), (sh, sw) = x.shape[-2:], self.kernel_size, self.stride
        ph, pw = max((math.ceil(h/sh) - 1)*sh + kh - h, 0), max((math.ceil(w/sw) - 1)*sw + kw - w, 0)
        return F.conv2d(F.pad(x, [pw//2, pw - pw//2, ph//2, ph - ph//2]), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
class Standardized(nn.Conv2d):
    def forward(self, x): return F.conv2d(x, F.layer_norm(self.weight, self.weight.shape[1:]), self.bias, self.stride, self.padding)

def test_convolutions_with_a_forward_of_their_own(capsys):
    m = nn.Sequential(Same(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Standardized(8, 8, 3, padding=1), nn.ReLU(), Same(8, 8, 5, groups=8), nn.Conv2d(8, 4, 1)).eval()
    calibrate(m, [X])
    q = quantize(m, 8, 8)
    assert '3 layers of Same, Standardized' in capsys.readouterr().out and sum(isinstance(c, RepQLayer) for c in q.modules()) == 4
    net = to_integer(calibrate(q, [X]).eval(), X)
    assert sum(s.op == 'layer' for s in net.steps) == 4 and not any(s.op == 'float' for s in net.steps)
    assert (net(X) - m(X)).norm() < .05*m(X).norm() and differing(net, X)['differing'] == 0
    assert {'0.weight', '1.weight', '5.weight', '6.bias'} <= set(original_names(q).values())
    with pytest.raises(ValueError, match='Standardized computed'): original_state_dict(q)

@pytest.mark.parametrize('name', ['tf_efficientnetv2_b0', 'nfnet_l0', 'efficientvit_b0'])
def test_of_timm(name):
    timm = pytest.importorskip('timm')
    m, x = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    q = quantize(m, 8, 8, verbose=False, example_input=x)
    convolutions = [c for c in q.modules() if isinstance(c, nn.Conv2d)]
    inside = {c for r in q.modules() if isinstance(r, RepQLayer) for c in r.modules()}
    assert convolutions and all(c in inside for c in convolutions)

@pytest.mark.parametrize('k, s, p, o, g', [(2, 2, 0, 0, 1), (4, 2, 1, 0, 2), (3, 2, 1, 1, 1), (3, 2, 0, 0, 1), (4, 4, 0, 0, 4), (3, 1, 1, 0, 1)])
def test_transposed_convolutions(k, s, p, o, g, capsys):
    m = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, k, s, p, o, g), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    calibrate(m, [X])
    q = calibrate(quantize(m, 8, 8), [X]).eval()
    assert '1 transposed convolution' in capsys.readouterr().out and (q(X) - m(X)).norm() < .05*m(X).norm()
    assert set(original_state_dict(q)) >= set(m.state_dict())
    net = to_integer(q, X)
    assert sum(s.op == 'layer' for s in net.steps) == 3 and not any(s.op == 'float' for s in net.steps)
    assert differing(net, X)['differing'] == 0
