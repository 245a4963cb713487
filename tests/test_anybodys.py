"Networks that combine what nobody thought of: two inputs, named outputs, shared blocks, from `prepare` to a file."
import collections, copy, dataclasses, functools, operator, sys, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
import repq
from repq.integers import check_integers, to_integer
from repq.surgery import adopt, calibrate, quantize, registered

class Branches(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branches = nn.ModuleDict(dict(square=nn.Conv2d(c, c, 3, padding=1, bias=False), tall=nn.Conv2d(c, c, (3, 1), padding=(1, 0)), point=nn.Conv2d(c, c, 1)))
        self.after = nn.BatchNorm2d(c)
    def forward(self, x): return self.after(sum(b(x) for b in self.branches.values()) + x).relu()

class TwoEyes(nn.Module):
    "Two inputs of different sizes, an encoder that both share, a gate, a norm after a sum, PixelShuffle, PReLU, a dictionary"
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.PReLU(8), Branches(8))
        self.fuse, self.own, self.gate, self.norm = nn.Conv2d(16, 8, 3, padding=1), Branches(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.up, self.head = nn.Conv2d(8, 4, (1, 3), padding=(0, 1)), nn.Linear(8, 5)
    def forward(self, left, right):
        a, b = self.enc(left), self.enc(F.interpolate(right, scale_factor=2))
        f = self.own(self.fuse(torch.cat([a, b], 1)))
        g = torch.sigmoid(self.gate(f))
        y = self.norm(f*g + a*(1 - g))
        return dict(map=F.pixel_shuffle(self.up(F.silu(y)), 2), score=self.head(y.relu().mean((2, 3))))

@pytest.fixture(scope='module')
def eyes():
    torch.manual_seed(0)
    loader = [dict(right=torch.randn(4, 3, 8, 8), left=torch.randn(4, 3, 16, 16))] # not in the order of the arguments
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        q = repq.prepare(TwoEyes(), loader, weight_bits=8, input_bits=8, verbose=False)
    return q, loader, ' '.join(str(w.message) for w in said)

def test_two_inputs_to_a_file(eyes, tmp_path, capsys):
    "Inputs in the order of the arguments, whatever the order in the batch; other formats name themselves"
    q, loader, _ = eyes
    sum(v.square().mean() for v in q(**loader[0]).values()).backward()
    assert all(p.grad.isfinite().all() for p in q.parameters())
    pytest.importorskip('onnxruntime')
    repq.export(q, tmp_path/'net.onnx', loader)
    assert 'equals the integer reference in all' in capsys.readouterr().out
    repq.export(q, tmp_path/'net.safetensors', loader)
    with pytest.raises(ValueError, match='TwoEyes takes 2 tensors: .tflite is for networks of one'): repq.export(q, tmp_path/'net.tflite', loader)

def test_branches_are_counted_once(eyes):
    "The parts of a sum are one with it: three convolutions of a block in two places, not sixteen"
    q, _, said = eyes
    assert "3 parallel convolutions stay branches, each a layer of its own: enc.2 ('enc.2.branches.square' stands in more than one place)" in said
    assert len(registered(q)) == 9 and 'Block(' in str(q.own)

Named = collections.namedtuple('Named', 'logits features')
@dataclasses.dataclass
class Record:
    logits: torch.Tensor
    features: tuple

class Gives(nn.Module):
    def __init__(self, kind): super().__init__(); self.kind, self.conv, self.act, self.head = kind, nn.Conv2d(3, 8, (3, 1), (2, 1)), nn.PReLU(), nn.Linear(8, 4)
    def forward(self, x):
        y = self.act(self.conv(x))
        return self.kind(self.head(y.mean((2, 3))), (y, Named(y, y.sigmoid())) if self.kind is Named else (y,))

@pytest.mark.parametrize('kind', [Named, Record])
def test_named_outputs(kind, tmp_path):
    "Named tuples, in one another, and dataclasses are structure, not operations"
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    q = calibrate(quantize(Gives(kind), 8, 8, verbose=False), [x])
    assert not check_integers(q) and not check_integers(q, x)
    assert isinstance(adopt(Gives(kind), verbose=False)(x), kind)
    pytest.importorskip('onnxruntime')
    repq.export(q, tmp_path/'net.onnx', x)

def test_an_affine_that_changes_nothing(tmp_path, capsys):
    "Times one plus nothing between two grids (HGNetV2 as it begins): ONNX Runtime must not take the rounding out with it"
    class Affine(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c, self.scale, self.bias = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.Conv2d(8, 4, 1), nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        def forward(self, x): return self.c(self.b(self.a(x).relu()*self.scale + self.bias).relu())
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    q = calibrate(quantize(Affine(), 8, 8, verbose=False, adopt=False), [x])
    pytest.importorskip('onnxruntime')
    repq.export(q, tmp_path/'net.onnx', x)
    assert 'equals the integer reference in all' in capsys.readouterr().out

# ---- networks as users write them

def conv_bn(i, o, k=3, s=1): return nn.Sequential(nn.Conv2d(i, o, k, s, k//2, bias=False), nn.BatchNorm2d(o))

class Asks(nn.Module):
    "Asks its layers for their type, device and bias, as EdgeNeXt and ConViT do"
    def __init__(self): super().__init__(); self.a, self.b, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False), nn.ConvTranspose2d(8, 4, 2, 2)
    def forward(self, x):
        y = self.a(x.to(self.a.weight.dtype)).relu()
        mask = torch.ones(1, 8, 1, 1, dtype=self.b.weight.dtype, device=self.b.weight.device)
        y = self.b(y*mask) if self.b.bias is None and self.b.weight.shape[1] == 8 else y
        return self.up(y.relu()) if self.up.weight.ndim == 4 and self.up.bias is not None else y

class Takes(nn.Module):
    "Computes with weights of its layers, around the layers; one of them it calls as well, in a sum that would merge"
    def __init__(self): super().__init__(); self.stem, self.a, self.b, self.qkv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)
    def forward(self, x):
        x = self.stem(x).relu()
        y = (self.a(x) + self.b(x)).relu() + F.conv2d(x, self.b.weight)
        return F.linear(y.mean((2, 3)), self.qkv.weight)

class Stacked(nn.Module):
    def __init__(self, total): super().__init__(); self.stem, self.bs, self.total = nn.Conv2d(3, 8, 3, 2, 1), nn.ModuleList([conv_bn(8, 8), conv_bn(8, 8, 1), nn.BatchNorm2d(8)]), total
    def forward(self, x): x = self.stem(x); return self.total([b(x) for b in self.bs], x).relu()

def by_kind(values, x):
    out = None
    for v in values: out = torch.add(out, v) if isinstance(out, torch.Tensor) else v
    return out

TOTALS = dict(stack=lambda v, x: torch.stack(v).sum(0), mean=lambda v, x: torch.stack(v, -1).mean(dim=-1), kind=by_kind, alpha=lambda v, x: torch.add(v[0] + v[1], v[2], alpha=.5),
              zeros=lambda v, x: sum(v, torch.zeros_like(x)), summed=lambda v, x: torch.sum(torch.stack(v, 1), 1))

class OwnNorm(nn.Module):
    def __init__(self, n): super().__init__(); self.weight, self.bias = nn.Parameter(torch.rand(n)), nn.Parameter(torch.rand(n)); self.register_buffer('running_mean', torch.zeros(n)); self.register_buffer('running_var', torch.ones(n))
    def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, .1, 1e-5)

class Normed(nn.Module):
    "Two branches with batch norms as a module of one's own, and as a function"
    def __init__(self): super().__init__(); self.stem, self.a, self.b, self.own, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), OwnNorm(8), nn.BatchNorm2d(8)
    def forward(self, x):
        x, bn = self.stem(x), self.bn
        return (self.own(self.a(x)) + F.batch_norm(self.b(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum, bn.eps)).relu()

class UNet(nn.Module):
    "Pads to the size of its skip, which is clipped and read on a grid of both signs"
    def __init__(self): super().__init__(); self.a, self.b, self.up, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(16, 4, 3, padding=1)
    def forward(self, x):
        a = self.a(x).relu()
        y = self.up(self.b(F.max_pool2d(a, 2)).relu())
        dy, dx = a.size()[2] - y.size()[2], a.size()[3] - y.size()[3]
        return self.c(torch.cat([a, F.pad(y, [dx//2, dx - dx//2, dy//2, dy - dy//2])], dim=1))

class Anchors(nn.Module):
    "Anchors kept from call to call, made anew for another number of images; windows through `view`; the larger of channels; floats beside a clipped value"
    def __init__(self): super().__init__(); self.a, self.b, self.f, self.shape, self.anchors = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), None, None
    def forward(self, x):
        a = self.a(x).relu()
        y = a + self.f(self.b(a))
        n, c, h, w = y.shape
        if self.shape != y.shape: self.anchors, self.shape = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')).float().view(2, -1), y.shape
        z = torch.cat([y.view(n, c, -1)[:, :2] - self.anchors, torch.max(y, 1, keepdim=True)[0].view(n, 1, -1)], 1)
        return z, y.view(n, c, h//2, 2, w//2, 2).permute(0, 2, 4, 3, 5, 1).contiguous().view(n, -1, 4*c)

class Recurrent(nn.Module):
    def __init__(self): super().__init__(); self.a, self.rnn, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.LSTM(32, 6, batch_first=True), nn.Linear(6, 3)
    def forward(self, x): y = self.a(x).relu(); n, c, h, w = y.shape; return self.fc(self.rnn(y.permute(0, 3, 1, 2).reshape(n, w, c*h))[0])

def to_file(net, x, tmp_path, **kw):
    "Trained a step, and written: the integers of the file are those of the reference"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        q = calibrate(quantize(net, 8, 8, verbose=False, **kw), [x])
    sum(t.square().mean() for t in torch.utils._pytree.tree_leaves(q(x))).backward()
    pytest.importorskip('onnxruntime')
    repq.export(q, tmp_path/'net.onnx', x)
    return q

@pytest.mark.parametrize('kind', [Asks, UNet, Anchors, Recurrent])
def test_as_users_write_them(kind, tmp_path):
    torch.manual_seed(0)
    to_file(kind(), torch.randn(4, 3, 18, 22) if kind is UNet else torch.randn(4, 3, 16, 16), tmp_path)

@pytest.mark.parametrize('total', TOTALS)
def test_every_way_to_add(total, tmp_path):
    "However a sum of branches is written, it is one convolution"
    if total == 'kind' and sys.version_info < (3, 11): pytest.skip('where code is within a line is known since Python 3.11')
    torch.manual_seed(0)
    net = Stacked(TOTALS[total]).eval()
    x = torch.randn(4, 3, 16, 16)
    adopted = adopt(net, verbose=False)
    torch.testing.assert_close(adopted(x), net(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(adopted.train()(x), net.train()(x), atol=1e-4, rtol=1e-3)
    assert len(registered(to_file(net, x, tmp_path))) == 2

def test_norms_of_ones_own(tmp_path):
    torch.manual_seed(0)
    assert len(registered(to_file(Normed(), torch.randn(4, 3, 16, 16), tmp_path))) == 2

def test_weights_taken(tmp_path, capsys):
    "A layer whose weight is used beside it stays in floating point and is named; where that cannot be seen, the use is refused"
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    q = calibrate(quantize(Takes(), 8, 8), [x])
    assert 'left: b, qkv (the model reads its weight itself)' in capsys.readouterr().out
    assert type(q.b) is nn.Conv2d and type(q.qkv) is nn.Linear
    class Hidden(Takes): # from a trace, too
        def forward(self, x): return super().forward(x) if x.abs().sum() > 0 else x
    with pytest.raises(ValueError, match=r"'(b|qkv)': the model's own code computes with the weight.*layer_bits"): calibrate(quantize(Hidden(), 8, 8, verbose=False), [x])

def test_computed_factors_are_named():
    class Weighted(Stacked):
        def __init__(self): super().__init__(None); self.w = nn.Parameter(torch.zeros(3))
        def forward(self, x): x = self.stem(x); w = self.w.softmax(0); return sum(w[i]*b(x) for i, b in enumerate(self.bs))
    with pytest.warns(UserWarning, match='computed of parameters'): adopt(Weighted(), verbose=False)

# ---- RepVGG in six hands, and names, lines and forms that strangers have

class Style(nn.Module):
    "A block after a stem; all of it is two layers"
    def __init__(self, c=8): super().__init__(); self.stem = nn.Conv2d(3, c, 3, 2, 1); self.make(c)
    def forward(self, x): return self.block(self.stem(x).relu())

class Inline(Style):
    "A sum in place, an identity that is a norm, its own names"
    def make(self, c): self.dense, self.one, self.skip, self.act = conv_bn(c, c), conv_bn(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(inplace=True)
    def block(self, x):
        y = self.dense(x)
        y += self.one(x)
        if self.skip is not None: y += self.skip(x)
        return self.act(y)

class NormAfter(Style):
    "One norm after the sum, the identity as it is"
    def make(self, c): self.k3, self.k1, self.bn = nn.Conv2d(c, c, 3, 1, 1), nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)
    def block(self, x): return F.relu(self.bn(self.k3(x) + self.k1(x) + x))

class Alphas(Style):
    "Branches in dictionaries, each with its factor, added up as a stack"
    def make(self, c):
        self.br = nn.ModuleDict({'3': nn.Conv2d(c, c, 3, 1, 1, bias=False), '1': nn.Conv2d(c, c, 1, bias=False)})
        self.bns = nn.ModuleDict({k: nn.BatchNorm2d(c) for k in self.br})
        self.alpha, self.beta = nn.ParameterDict({k: nn.Parameter(torch.rand(1) + .5) for k in self.br}), nn.Parameter(torch.rand(1, c, 1, 1))
    def block(self, x): return torch.stack([*(self.alpha[k]*self.bns[k](b(x)) for k, b in self.br.items()), self.beta*x]).sum(dim=0).clamp(min=0)

class PadBefore(Style):
    "A border of its own, before a convolution without one"
    def make(self, c): self.c3, self.b3, self.c1, self.b1, self.id = nn.Conv2d(c, c, 3, bias=False), nn.BatchNorm2d(c), nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c), nn.BatchNorm2d(c)
    def block(self, x):
        y = self.b3(self.c3(F.pad(x, [1, 1, 1, 1]))) + self.b1(self.c1(x))
        if self.id: y = y + self.id(x)
        return y.relu()

class Gated(Inline):
    "Squeeze and excitation between the sum and the activation: two layers more"
    def make(self, c): super().make(c); self.act, self.fc1, self.fc2 = nn.SiLU(inplace=True), nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)
    def block(self, x):
        y = self.dense(x) + self.one(x) + self.skip(x)
        return self.act(y*torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean([2, 3], keepdim=True)), inplace=True))))

class Many(Style):
    "Three of a kind in a list, asymmetric ones, an average after a 1×1, by `functools.reduce`; a sequence of one's own class"
    class Pair(nn.Sequential):
        def __init__(self, c): super().__init__(nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c))
    def make(self, c):
        self.k3, self.bn = nn.ModuleList(Many.Pair(c) for _ in range(3)), nn.BatchNorm2d(c)
        self.tall, self.wide, self.pool = nn.Conv2d(c, c, (3, 1), 1, (1, 0)), nn.Conv2d(c, c, (1, 3), 1, (0, 1)), nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.AvgPool2d(3, 1, 1))
    def block(self, x): return self.bn(functools.reduce(operator.add, [m(x) for m in self.k3], self.tall(x) + self.wide(x) + self.pool(x))).relu_()

@pytest.mark.parametrize('kind', [Inline, NormAfter, Alphas, PadBefore, Gated, Many])
def test_repvgg_in_six_hands(kind, tmp_path):
    "One layer for each block, the same values in both modes, a file of integers"
    torch.manual_seed(0)
    net, x = kind().eval(), torch.randn(4, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        adopted = adopt(net, x, verbose=False)
    torch.testing.assert_close(adopted(x), net(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(copy.deepcopy(adopted).train()(x), copy.deepcopy(net).train()(x), atol=1e-4, rtol=1e-3)
    assert len(registered(to_file(net, x, tmp_path))) == (4 if kind is Gated else 2)

class Meta(nn.Module):
    "A layer by a name that torch's graphs have use for"
    def __init__(self, name): super().__init__(); self.stem, self.name = nn.Conv2d(3, 8, 3), name; self.add_module(name, nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8)))
    def forward(self, x, y): return self.stem(x)*torch.sigmoid(getattr(self, self.name)(y))[:, :, None, None]

def test_names_that_torch_has_use_for(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    q = calibrate(quantize(Meta('meta'), 8, 8, verbose=False), [x])
    assert not check_integers(q, x) and not check_integers(copy.deepcopy(q), x)
    pytest.importorskip('onnxruntime')
    repq.export(q, tmp_path/'net.onnx', [x])
    q = calibrate(quantize(Meta('graph'), 8, 8, verbose=False), [x])
    with pytest.raises(ValueError, match="'graph' in Meta needs another name"): repq.export(q, tmp_path/'other.onnx', [x])

def test_lines_of_adopted_code():
    "Where a forward pass is written anew, messages name the model's own line"
    class Sorted(Inline):
        def forward(self, x): return super().forward(x).sort(1)[0] # its own line
    torch.manual_seed(0)
    found = check_integers(Sorted(), torch.randn(4, 3, 16, 16))
    assert found and all('its own line' in o.line and 'test_anybodys.py' in o.line for o in found), found

def test_torchscript_is_refused():
    net = nn.Sequential(torch.jit.trace(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)), nn.Conv2d(4, 2, 1))
    for verb in quantize, adopt, lambda m: repq.prepare(m, [torch.randn(2, 3, 8, 8)]):
        with pytest.raises(ValueError, match="'0' is TorchScript, whose layers cannot be replaced"): verb(net)

class Predicts(nn.Module):
    "A detector's head: boxes are assigned into parts of the prediction"
    def __init__(self): super().__init__(); self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 18, 1); self.register_buffer('anchors', torch.rand(3, 2)*4)
    def forward(self, x):
        p = self.head(self.stem(x).relu())
        n, _, h, w = p.shape
        y = p.view(n, 3, 6, h, w).permute(0, 1, 3, 4, 2).sigmoid()
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
        y[..., 0:2] = (y[..., 0:2]*2 - .5 + torch.stack((columns, rows), -1))*2
        y[..., 2:4] *= self.anchors.view(1, 3, 1, 1, 2)
        y[..., 4].mul_(.5)
        return y.reshape(n, -1, 6)

def test_parts_that_are_assigned(tmp_path):
    torch.manual_seed(0)
    m, x = Predicts(), torch.randn(4, 3, 16, 16)
    q = calibrate(quantize(m, 16, 16, first_last_bits=16, verbose=False), [x])
    torch.testing.assert_close(q.eval()(x), m(x), atol=.05, rtol=.02)
    q = calibrate(quantize(m, 8, 8, verbose=False), [x]).eval()
    assert (to_integer(q, x)(x) - q(x)).abs().max() < .02*q(x).abs().max()
    pytest.importorskip('onnxruntime')
    repq.export(q, tmp_path/'net.onnx', x)
