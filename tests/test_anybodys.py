"Networks that combine what nobody thought of: two inputs, named outputs, shared blocks, from `prepare` to a file."
import collections, dataclasses, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
import repq
from repq.integers import check_integers
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
