"Blocks of others, taken over: by structure, with the same parameters, in both modes; or left as they are and named."
import copy, pickle, warnings
import pytest, torch
from torch import nn
from torch.nn.utils import prune
from repq.blocks import Block
from repq.surgery import adopt, calibrate, deploy, original_state_dict, quantize, registered
from repq.integers import check_integers, to_integer
from helpers import close, randomize

class ConvNorm(nn.Module):
    "As many a library has it"
    def __init__(self, i, o, k=1, s=1, d=1, g=1): super().__init__(); self.conv = nn.Conv2d(i, o, k, s, d*(k//2), d, g, bias=False); self.norm = nn.BatchNorm2d(o)
    def forward(self, x): return self.norm(self.conv(x))

class RepConvN(nn.Module): # YOLOv7, YOLOv9
    def __init__(self, c, s=1): super().__init__(); self.act, self.conv1, self.conv2, self.bn = nn.SiLU(), ConvNorm(c, c, 3, s), ConvNorm(c, c, 1, s), nn.BatchNorm2d(c) if s == 1 else None
    def forward(self, x): return self.act(self.conv1(x) + self.conv2(x) + (0 if self.bn is None else self.bn(x)))
    def fuse_convs(self): pass

class RepVGGDW(nn.Module): # YOLOv10
    def __init__(self, c): super().__init__(); self.conv, self.conv1, self.act = ConvNorm(c, c, 7, g=c), ConvNorm(c, c, 3, g=c), nn.SiLU()
    def forward(self, x): return self.act(self.conv(x) + self.conv1(x))

class RepVitDW(nn.Module): # RepViT, YOLOE
    def __init__(self, c): super().__init__(); self.conv, self.conv1, self.bn = ConvNorm(c, c, 3, g=c), nn.Conv2d(c, c, 1, groups=c), nn.BatchNorm2d(c)
    def forward(self, x): return self.bn(self.conv(x) + self.conv1(x) + x)

class RepMixer(nn.Module): # FastViT
    def __init__(self, c): super().__init__(); self.mixer, self.point, self.norm, self.skip, self.gamma = ConvNorm(c, c, 3, g=c), ConvNorm(c, c, 1, g=c), nn.BatchNorm2d(c), nn.BatchNorm2d(c), nn.Parameter(torch.rand(c)*1e-5)
    def forward(self, x): return x + (self.mixer(x) + self.point(x) + self.skip(x) - self.norm(x))*self.gamma.view(1, -1, 1, 1)

class Conv3XC(nn.Module): # SPAN, in training
    def __init__(self, c): super().__init__(); self.sk, self.conv = nn.Conv2d(c, c, 1), nn.Sequential(nn.Conv2d(c, 2*c, 1), nn.Conv2d(2*c, 2*c, 3), nn.Conv2d(2*c, c, 1))
    def forward(self, x): return self.conv(nn.functional.pad(x, (1, 1, 1, 1))) + self.sk(x)

class LearnableRep(nn.Module): # PP-LCNet-V3
    def __init__(self, c):
        super().__init__()
        self.convs, self.point, self.identity = nn.ModuleList([ConvNorm(c, c, 3) for _ in range(3)]), ConvNorm(c, c, 1), nn.BatchNorm2d(c)
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    def forward(self, x):
        out = self.identity(x)
        out += self.point(x)
        for c in self.convs: out += c(x)
        return self.scale*out + self.bias

class RepC3(nn.Module): # RT-DETR
    def __init__(self, c): super().__init__(); self.cv1, self.cv2, self.m = ConvNorm(c, c), ConvNorm(c, c), nn.Sequential(RepConvN(c), RepConvN(c))
    def forward(self, x): return self.m(self.cv1(x)) + self.cv2(x)

class QARep(nn.Module): # YOLO-NAS: an identity of a class of its own, a convolution for later that is not called
    class Residual(nn.Module):
        def forward(self, x): return x
    def __init__(self, c): super().__init__(); self.dense, self.point, self.identity, self.post, self.alpha = ConvNorm(c, c, 3), nn.Conv2d(c, c, 1), QARep.Residual(), nn.BatchNorm2d(c), nn.Parameter(torch.ones(1))
    def forward(self, x): return torch.relu(self.post(self.dense(x) + self.alpha*self.point(x) + self.identity(x)))

class DilatedReparam(nn.Module): # UniRepLKNet
    def __init__(self, c):
        super().__init__()
        self.lk_origin, self.origin_bn, self.sizes = nn.Conv2d(c, c, 7, padding=3, groups=c, bias=False), nn.BatchNorm2d(c), [(5, 1), (3, 2), (3, 3)]
        for k, r in self.sizes:
            setattr(self, f'dil_conv_k{k}_{r}', nn.Conv2d(c, c, k, padding=(r*(k - 1) + 1)//2, dilation=r, groups=c, bias=False)); setattr(self, f'dil_bn_k{k}_{r}', nn.BatchNorm2d(c))
    def forward(self, x):
        out = self.origin_bn(self.lk_origin(x))
        for k, r in self.sizes: out = out + self.__getattr__(f'dil_bn_k{k}_{r}')(self.__getattr__(f'dil_conv_k{k}_{r}')(x))
        return out

class Implicit(nn.Module): # YOLOR's and YOLOv7's heads: an addend before a 1×1, a factor after it
    def __init__(self, c): super().__init__(); self.a, self.conv, self.m = nn.Parameter(torch.rand(1, c, 1, 1)), nn.Conv2d(c, c, 1), nn.Parameter(torch.rand(1, c, 1, 1))
    def forward(self, x): return self.m*self.conv(self.a + x)

class Expanded(nn.Module): # SESR: a linear sequence, wider than what it merges into
    def __init__(self, c): super().__init__(); self.wide, self.narrow = nn.Conv2d(c, 8*c, 3, padding=1, bias=False), nn.Conv2d(8*c, c, 1)
    def forward(self, x): return self.narrow(self.wide(x))

class AveragePool(nn.Module): # YOLOv6, DBB without a border in between
    def __init__(self, c): super().__init__(); self.dense, self.avg = ConvNorm(c, c, 3), nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(c))
    def forward(self, x): return torch.relu(self.dense(x) + self.avg(x))

def net(block, c=8): return nn.Sequential(nn.Conv2d(3, c, 3, 2, 1), nn.ReLU(), block, nn.ReLU(), nn.Conv2d(c, 4, 1))

KINDS = dict(qarep=(QARep, 3), dilated=(DilatedReparam, 3), implicit=(Implicit, 3), expanded=(Expanded, 3), repconvn=(RepConvN, 3), strided=(lambda c: RepConvN(c, 2), 3), repvggdw=(RepVGGDW, 3), repvit=(RepVitDW, 3), repmixer=(RepMixer, 3), conv3xc=(Conv3XC, 3), learnable=(LearnableRep, 3), pool=(AveragePool, 3),
             repc3=(RepC3, 6))

@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)

def same(a, b, x, tol=1e-4):
    for mode in False, True:
        for m in a, b: m.train(mode)
        state = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
        close(b(x), a(x), tol)
        for m, s in zip((a, b), state): m.load_state_dict(s)

@pytest.mark.parametrize('kind', KINDS)
def test_kind(kind):
    "One layer per convolution of the merged network; the same values, gradients' places, names"
    make, layers = KINDS[kind]
    model = randomize(net(make(8)))
    x = torch.randn(4, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        new = adopt(model, x, verbose=False)
    same(model, new, x)
    assert len(registered(new)) == layers and sum(isinstance(s.module, Block) for s in registered(new)) >= 1
    back = original_state_dict(new)
    assert back.keys() == model.state_dict().keys() and all(torch.equal(v, model.state_dict()[k]) for k, v in back.items())
    own = adopt(model, inplace=True, verbose=False)
    assert {id(p) for p in model.parameters()} <= {id(p) for p in own.parameters()}

@pytest.mark.parametrize('kind', ['repconvn', 'repmixer', 'conv3xc'])
def test_quantized_layers(kind):
    make, layers = KINDS[kind]
    model = randomize(net(make(8)))
    q = quantize(model, 8, 8, verbose=False)
    x = torch.randn(4, 3, 12, 12)
    assert len(registered(q)) == layers
    q = calibrate(q, [x])
    close(deploy(q, verbose=False)(x), q.eval()(x), 1e-4)
    assert original_state_dict(q).keys() == model.state_dict().keys()
    assert len(registered(quantize(model, 8, 8, verbose=False, adopt=False))) > layers

def test_parameters_are_the_same_objects():
    model = net(RepConvN(8))
    params = dict(model.named_parameters())
    adopt(model, inplace=True, verbose=False)
    assert {id(p) for p in model.parameters()} == {id(p) for p in params.values()}

def test_copies_and_pickles():
    model = adopt(net(RepConvN(8)), verbose=False).eval()
    x = torch.randn(2, 3, 12, 12)
    for m in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(m(x), model(x)) and isinstance(m[2], RepConvN)
    with pytest.raises(RuntimeError, match='adopted'): model[2].fuse_convs()

# another way in evaluation

class MergesInEvaluation(nn.Module):
    "As SPAN's convolution does, in every call"
    def __init__(self, c, right=True):
        super().__init__()
        self.a, self.b, self.merged, self.act, self.right = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), right
    def forward(self, x):
        if self.training: return self.act(self.a(x) + self.b(x))
        self.merged.weight.data = self.a.weight.data + nn.functional.pad(self.b.weight.data, (1, 1, 1, 1))
        self.merged.bias.data = self.a.bias.data + self.b.bias.data*self.right
        return self.act(self.merged(x))

def test_merges_in_evaluation():
    "Training's way is taken in either mode, and the convolution for the other is written back, merged anew"
    model, x = randomize(net(MergesInEvaluation(8))), torch.randn(4, 3, 12, 12)
    before = copy.deepcopy(model.state_dict())
    new = adopt(model, x, verbose=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if 'merged' not in k)
    assert len(registered(new)) == 3 and isinstance(new[2], MergesInEvaluation)
    same(model, new, x, 1e-5)
    model.eval()(x) # merges
    for m in new, quantize(model, 8, 8, verbose=False):
        back = original_state_dict(m)
        assert back.keys() == model.state_dict().keys()
        for k, v in model.state_dict().items(): close(back[k], v, 1e-5)
    for m in copy.deepcopy(new), pickle.loads(pickle.dumps(new)): close(m.eval()(x), model(x), 1e-5)

def test_another_value_in_evaluation():
    "What evaluation computes otherwise is another network: it stays"
    model, x = randomize(net(MergesInEvaluation(8, right=False))), torch.randn(4, 3, 12, 12)
    new = adopt(model, x, verbose=False)
    assert not any(isinstance(m, Block) for m in new.modules()) and type(new[2]) is MergesInEvaluation
    assert torch.equal(new.eval()(x), model.eval()(x))

def test_not_all_of_a_module():
    "A parameter that is there and not used stays where it is"
    class Beside(RepVitDW):
        def __init__(self, c): super().__init__(c); self.unused = nn.Conv2d(c, c, 1)
    model = net(Beside(8))
    back = original_state_dict(adopt(model, verbose=False))
    assert back.keys() == model.state_dict().keys()

# a whole model that is one convolution

class Sequence(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
    def forward(self, x): return self.last(self.conv(x) + 1)
class SumAtTheTop(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
    def forward(self, image): return self.bn(self.a(image) + self.b(image))

@pytest.mark.parametrize('make', [Sequence, SumAtTheTop])
def test_whole_model(make):
    "It stays of its class, with one block inside, and becomes integers"
    model, x = randomize(make()), torch.randn(4, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        new = adopt(model, x, verbose=False)
        q = calibrate(quantize(model, 8, 8, verbose=False), [x])
    assert isinstance(new, make) and len(registered(new)) == len(registered(q)) == 1
    same(model, new, x)
    assert original_state_dict(new).keys() == model.state_dict().keys()
    assert not check_integers(q, x)

def test_lone_layer_to_integers():
    "A layer with nothing around it is a network as well"
    x = torch.randn(4, 3, 12, 12)
    q = calibrate(quantize(nn.Conv2d(3, 4, 3), 8, 8, verbose=False), [x])
    assert not check_integers(q, x) and to_integer(q, x)(x).shape == (4, 4, 10, 10)

def test_sequence_is_not_called_branches():
    "What stays apart is called what it is"
    class Makes(Sequence):
        def forward(self, x): return super().forward(x)*torch.tensor(2.)
    with pytest.warns(UserWarning, match='2 convolutions in sequence stay apart, each a layer of its own: Makes .its forward makes tensors'): new = adopt(Makes())
    assert len(registered(new)) == 2

# signals and rows

class Signals(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.stem, self.bn = nn.Conv1d(3, c, 5, 2, 2, bias=False), nn.BatchNorm1d(c)
        self.a, self.na, self.b, self.nb, self.n, self.gamma = nn.Conv1d(c, c, 3, padding=1, bias=False), nn.BatchNorm1d(c), nn.Conv1d(c, c, 1), nn.BatchNorm1d(c), nn.BatchNorm1d(c), nn.Parameter(torch.rand(c, 1))
        self.head = nn.Linear(c, 5)
    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = ((self.na(self.a(x)) + self.nb(self.b(x)) + self.n(x))*self.gamma).relu()
        return self.head(x.mean(2))

class Rows(nn.Module):
    def __init__(self, c): super().__init__(); self.first, self.a, self.na, self.b, self.n, self.last = nn.Linear(6, c), nn.Linear(c, c, bias=False), nn.BatchNorm1d(c), nn.Linear(c, c), nn.BatchNorm1d(c), nn.Linear(c, 4)
    def forward(self, x):
        x = self.first(x).relu()
        return self.last((self.na(self.a(x)) + self.b(x) + self.n(x)).relu())

class NormFirst(nn.Module): # LeViT's and RepViT's heads
    def __init__(self, c): super().__init__(); self.first, self.bn, self.drop, self.linear = nn.Linear(6, c), nn.BatchNorm1d(c), nn.Dropout(0.), nn.Linear(c, 4)
    def forward(self, x): return self.linear(self.drop(self.bn(self.first(x).relu())))

class LowRank(nn.Module): # a LoRA adapter beside its layer, over tokens
    def __init__(self, c): super().__init__(); self.first, self.base, self.down, self.up = nn.Linear(6, c), nn.Linear(c, c), nn.Linear(c, 2, bias=False), nn.Linear(2, c, bias=False)
    def forward(self, x): x = self.first(x).relu(); return self.base(x) + self.up(self.down(x))*.5

FLAT = dict(signals=(Signals, 3, (8, 3, 20)), rows=(Rows, 3, (16, 6)), normfirst=(NormFirst, 2, (16, 6)), lowrank=(LowRank, 2, (4, 7, 6)))

@pytest.mark.parametrize('kind', FLAT)
def test_signals_and_rows(kind):
    "Conv1d, Linear and BatchNorm1d: one layer per merged layer, to integers"
    make, layers, shape = FLAT[kind]
    model, x = randomize(make(8)), torch.randn(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        new = adopt(model, x, verbose=False)
    same(model, new, x)
    assert len(registered(new)) == layers
    q = calibrate(quantize(model, 8, 8, verbose=False), [x])
    for m in new, q:
        back = original_state_dict(m)
        assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(v, original_state_dict(new)[k]) for k, v in model.state_dict().items())
    final = deploy(q, verbose=False)
    close(final(x), q.eval()(x), 1e-4)
    assert sum(type(m).__name__ == 'IntegerKernel' for m in final.modules()) == layers
    assert not check_integers(q, x)
    q.train()(x).mean().backward() # and it trains
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in q.named_parameters() if 'init' not in n)

# what must stay

class Used(RepConvN):
    "The value of a branch is returned as well"
    def forward(self, x): a = self.conv1(x); return self.act(a + self.conv2(x)) + a.mean()
class Strides(nn.Module):
    def __init__(self, c): super().__init__(); self.a, self.b = nn.Conv2d(c, c, 3, 1, 0), nn.Conv2d(c, c, 2, 1, 0)
    def forward(self, x): return self.a(x) + self.b(x)[..., :-1, :-1]
class Activated(nn.Module):
    def __init__(self, c): super().__init__(); self.a, self.b = nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU(), nn.Conv2d(c, c, 3, 1, 1)), nn.Conv2d(c, c, 1)
    def forward(self, x): return self.a(x) + self.b(x)
    def reparameterize(self): pass
class Padded(nn.Module):
    "Zeros around the map behind a bias: no border of the input becomes that"
    def __init__(self, c): super().__init__(); self.a, self.b = nn.Sequential(nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 3, 1, 1)), nn.Conv2d(c, c, 3, 1, 1)
    def forward(self, x): return self.a(x) + self.b(x)
class Shared(nn.Module):
    def __init__(self, c): super().__init__(); self.a, self.b = ConvNorm(c, c, 3), ConvNorm(c, c, 1)
    def forward(self, x): return self.a(x) + self.b(x) + torch.relu(self.a(x.relu()))
class Tied(nn.Module):
    def __init__(self, c): super().__init__(); self.a, self.b, self.c = nn.Conv2d(c, c, 3, 1, 1), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1); self.c.weight = self.b.weight
    def forward(self, x): return self.c(torch.relu(self.a(x) + self.b(x)))
class UnequalStrides(nn.Module):
    def __init__(self, c): super().__init__(); self.a, self.b = nn.Conv2d(c, c, 3, 2, 1), nn.Conv2d(c, c, 1, 1)
    def forward(self, x): return self.a(x) + self.b(x)[..., ::2, ::2].contiguous()
class Broadcast(nn.Module):
    "Strides that differ where the smaller map has one pixel"
    def __init__(self, c): super().__init__(); self.a, self.b = nn.Conv2d(c, c, 3, 1, 1), nn.Conv2d(c, c, 1, 99)
    def forward(self, x): return self.a(x) + self.b(x)
class SharedModule(nn.Module):
    "One block in two places"
    def __init__(self, c): super().__init__(); self.one = RepVitDW(c); self.other = self.one
    def forward(self, x): return self.other(self.one(x).relu())
class Modes(nn.Module):
    "Dropped at random in training only"
    def __init__(self, c): super().__init__(); self.a, self.b, self.drop = nn.Conv2d(c, c, 3, 1, 1), nn.Conv2d(c, c, 1), nn.Dropout(.5)
    def forward(self, x): return self.a(x) + self.drop(self.b(x))
    def fuse(self): pass
def hooked(c): b = RepConvN(c); b.conv1.conv.register_forward_hook(lambda m, i, o: o*2); return b
def pruned(c): b = RepConvN(c); prune.l1_unstructured(b.conv1.conv, 'weight', .5); return b

STAY = dict(unequal=UnequalStrides, broadcast=Broadcast, shared_module=SharedModule, used=Used, strides=Strides, activated=Activated, padded=Padded, shared=Shared, tied=Tied, modes=Modes, hooked=hooked, pruned=pruned)
NAMED = dict(broadcast='strides of branches differ', shared_module='more than one place', used='read by', padded='zeros are padded', shared='more than one place', tied='more than one place', modes='fuse', pruned='fuse_convs', activated='reparameterize')

@pytest.mark.parametrize('kind', STAY)
def test_stays_and_is_named(kind, capsys):
    model = net(STAY[kind](8))
    x = torch.randn(4, 3, 12, 12)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        new = adopt(model)
    close(new.eval()(x), model.eval()(x), 1e-5)
    assert not any(isinstance(m, Block) for m in new.modules()), new
    assert new.state_dict().keys() == model.state_dict().keys()
    if kind in NAMED: assert NAMED[kind] in ' '.join(str(w.message) for w in said)

def test_dynamic_control_flow():
    "Parts of a model that cannot be traced are still looked into; what decides by values stays"
    class Deciding(nn.Module):
        def __init__(self): super().__init__(); self.block, self.last = RepConvN(8), nn.Conv2d(8, 2, 1)
        def forward(self, x):
            y = self.block(x)
            return self.last(y) if y.sum() > 0 else self.last(-y)
    model, x = randomize(Deciding()), torch.randn(2, 8, 9, 9)
    new = adopt(model, x, verbose=False)
    assert sum(isinstance(m, Block) for m in new.modules()) == 1
    close(new.eval()(x), model.eval()(x), 1e-4)

class Code(nn.Module):
    "Asks a module inside for what adoption takes away"
    def __init__(self): super().__init__(); self.block = RepVitDW(8)
    def forward(self, x): return self.block(x)[..., :self.block.conv.conv.kernel_size[0]]

def test_code_that_needs_the_old_modules():
    model, x = randomize(Code()), torch.randn(2, 8, 9, 9)
    with pytest.warns(UserWarning, match='taken out'): new = adopt(model)
    assert new.state_dict().keys() == model.state_dict().keys()
    close(new.eval()(x), model.eval()(x), 1e-6)

def test_growth_is_asked_for():
    "A depthwise kernel before a 1×1, a 3×3 after a 3×3: cheaper apart"
    model, x = randomize(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1))), torch.randn(3, 8, 9, 9)
    assert not any(isinstance(m, Block) for m in adopt(model, verbose=False).modules())
    new = adopt(model, grow=True, verbose=False)
    assert isinstance(new[0], Block) and len(registered(new)) == 1
    same(model, new, x)

def test_a_gate_is_no_branch():
    "One convolution and its norm with squeeze and excitation after it (MobileOne-s4 has one) has nothing to merge, whatever its methods are called"
    class Single(nn.Module):
        def __init__(self, c): super().__init__(); self.conv, self.fc1, self.fc2 = ConvNorm(c, c, 1), nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)
        def forward(self, x): x = self.conv(x); return torch.relu(x*self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid())
        def reparameterize(self): pass
    class Branched(Single):
        def forward(self, x): return super().forward(x) + self.fc2(self.fc1(x).relu())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        adopt(net(Single(8)))
    with pytest.warns(UserWarning, match='1 module with a method to merge stays as it is, 3 layers: 2 .reparameterize'): adopt(net(Branched(8)))

@pytest.mark.parametrize('name,layers', [('repvgg_a0', 23), ('mobileone_s0', 44), ('repvit_m0_9', 104), ('fastvit_t8', 53), ('repghostnet_050', 96)])
def test_timm(name, layers):
    timm = pytest.importorskip('timm')
    model = randomize(timm.create_model(name, num_classes=10)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', message='1 module with a method to merge .*head') # a norm before a linear layer stays
        new = adopt(model, verbose=False)
    assert len(registered(new)) == layers
    x = torch.randn(2, 3, 64, 64)
    close(new(x), model(x), 1e-4)
    back = original_state_dict(new)
    assert back.keys() == model.state_dict().keys() and all(torch.equal(v, model.state_dict()[k]) for k, v in back.items())
