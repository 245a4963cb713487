"What a model computes is read off its graph: in-place changes, arguments, subclasses, hooks, shapes. Integers are the model's, or it is refused by name."
import copy, pytest, torch, torch.nn.functional as F, torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from helpers import randomize
from repq.blocks import Block, RepVGGBlock
from repq.graphs import graph_module, norm_rest, trace_graph
from repq.integers import check_integers, to_integer
from repq.surgery import calibrate, deploy, find_sites, quantize, quantize_sums, reparametrize, tied

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))

def net(forward, seed=1, **modules):
    "Three convolutions and a head around `forward`"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mid, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.head, self.act, self.pool = nn.Linear(8, 5), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
            for n, m in modules.items(): setattr(self, n, m)
    Net.forward = forward
    torch.manual_seed(seed)
    return Net()

def ready(model, x=X, bits=8, **kw): return calibrate(quantize(model, bits, bits, verbose=False, **kw), [x]).eval()

def error(got, want): return ((got - want).abs().max()/want.abs().max()).item()

def rest(s, x): return s.head(s.tail(x).relu().mean((2, 3)))

def ordinary(s, x): x = s.stem(x); y = s.mid(F.relu(x)); return rest(s, y + x)
def statement(s, x): x = s.stem(x); s.act(x); return rest(s, x)
def functional(s, x): x = s.stem(x); F.relu(x, True); return rest(s, x)
def method(s, x): x = s.stem(x); x.relu_(); return rest(s, x)
def preact(s, x): x = s.stem(x); y = s.mid(s.act(x)); return rest(s, y + x)
def alias(s, x): x = s.stem(x).relu(); y = x; y += s.mid(x); return rest(s, x)
def added(s, x): x = s.stem(x).relu(); x.add_(s.mid(x)); return rest(s, x)
def listed(s, x): x = s.stem(x).relu(); return rest(s, sum([x, s.mid(x), x]))
def clamped(s, x): x = s.stem(x); x.clamp_(min=0); return rest(s, x)
def twice(s, x): x = s.stem(x); F.relu_(x); y = s.mid(x); s.act(y); return rest(s, y + x)
def out(s, x): x = s.stem(x).relu(); y = s.mid(x); torch.add(x, y, out=y); return rest(s, y)

@pytest.mark.parametrize('forward', [ordinary, statement, functional, method, preact, alias, added, listed, clamped, twice])
def test_in_place(forward):
    m = net(forward)
    q = ready(m)
    assert error(q(X), m(X)) < .02 and error(to_integer(q, X)(X), m(X)) < .03
    s = calibrate(quantize_sums(quantize(m, 8, 8, verbose=False)), [X]).eval()
    assert error(s(X), m(X)) < .03 and error(to_integer(s)(X), m(X)) < .03
    assert all(q.get_submodule(s.name).input_quantizer.signed is not s.nonnegative for s in find_sites(m)[0] if s.runs)

def below_zero(s, x): x = s.stem(x).relu(); x.sub_(.3); return rest(s, x)
def halved(s, x): x = s.stem(x).relu(); x *= .5; return rest(s, x)
def negated(s, x): x = s.stem(x).relu(); x.neg_(); return rest(s, x)
def assigned(s, x): x = s.stem(x).relu(); x[:, :4] = -1; return rest(s, x)
def sliced(s, x): x = s.stem(x); x[:, :4].relu_(); return rest(s, x)
def raised(s, x): x = s.stem(x); y = s.mid(x); y[:, 2:] += x[:, 2:]; y[:, 0].mul_(2); return rest(s, y)
def ended(s, x): y = s.head(s.tail(s.stem(x)).mean((2, 3))); y.view(-1).mul_(2); return y
def reshaped(s, x): x = s.stem(x); x.flatten(1).relu_(); return rest(s, x)
def scaled(s, x): x = s.stem(x).relu(); return rest(s, torch.add(x, s.mid(x), alpha=.5))
def scaled_method(s, x): x = s.stem(x).relu(); return rest(s, x.add(s.mid(x), alpha=2))
def smooth(s, x): return rest(s, F.interpolate(s.stem(x).relu(), scale_factor=2, mode='bilinear', align_corners=True))
def sized(s, x): return rest(s, F.interpolate(s.stem(x).relu(), size=(9, 9)))
def over_rows(s, x): return s.head(s.tail(s.stem(x).relu()).relu().mean(3).mean(2))
def ceil(s, x): return rest(s, F.avg_pool2d(s.stem(x).relu(), 3, 2, ceil_mode=True))
def border(s, x): return rest(s, F.avg_pool2d(s.stem(x).relu(), 3, 2, 1, count_include_pad=False))
def padded(s, x): return rest(s, F.pad(s.stem(x).relu(), (1, 1, 1, 1), value=2.))
def corner(s, x): return s.head(s.tail(s.stem(x).relu()).relu()[:, :, 0, 0])
def random(s, x): return rest(s, F.dropout(s.stem(x).relu(), .5))
def constant(s, x): return rest(s, s.stem(x).relu() + torch.ones(8, 1, 1))

@pytest.mark.parametrize('forward', [below_zero, halved, negated, assigned, sliced, raised, scaled, scaled_method, smooth, sized, over_rows, ceil, border, padded, corner, constant])
def test_what_was_refused_once_is_the_model(forward):
    m = net(forward)
    q = ready(m)
    ints = to_integer(q, X)
    assert error(q(X), m(X)) < .05 and error(ints(X), m(X)) < .06
    islands = [s.params['line'] for s in ints.steps if s.op == 'float' and s.params['call'] != 'get_attr']
    assert bool(islands) == (forward in (assigned, sliced, raised)) and all('test_graphs.py' in l for l in islands)
    assert bool(islands) == any('test_graphs.py' in o.line for o in check_integers(m, X))

@pytest.mark.parametrize('forward', [reshaped, ended, random])
def test_what_is_not_understood_is_refused_by_name_and_line(forward):
    m = net(forward)
    q = ready(m)
    if forward is not random: assert error(q(X), m(X)) < .05     # training is right all the same
    with pytest.raises(ValueError, match=r'test_graphs.py:\d+'): to_integer(q, X)
    found = check_integers(m, X)
    assert found and any('test_graphs.py' in o.line for o in found) and all(o.instead for o in found)

def test_what_nothing_reads_is_no_obstacle():
    code = """
def forward(s, x):
    assert x.ndim == 4 and x.shape[1] == 3, 'images'
    y = s.stem(x).relu()
    torch._assert(y.min() >= 0, 'a ReLU')
    assert not y.shape[0] < 0
    F.silu(y)                       # nobody reads it
    return rest(s, y)"""
    names = dict(torch=torch, F=F, rest=rest)
    exec(code, names) # pytest rewrites the assertions of this file
    m = net(names['forward'])
    assert find_sites(m)[1] == '' and not check_integers(m, X)

@pytest.mark.parametrize('flat', [lambda y: torch.flatten(y, 1), lambda y: y.view(y.size(0), -1), lambda y: y.reshape(y.shape[0], -1), lambda y: y.view(-1, 8), lambda y: y.squeeze(-1).squeeze(-1), lambda y: y[:, :, 0, 0],
                                  lambda y: y.view(y.size()[0], 8), lambda y: y.flatten(-3), lambda y: y.squeeze(3).squeeze(2), lambda y: y.reshape((-1, 8))])
def test_ways_to_flatten_are_one(flat):
    m, same = net(lambda s, x: s.head(flat(s.pool(s.stem(x).relu())))), net(lambda s, x: s.head(torch.flatten(s.pool(s.stem(x).relu()), 1)))
    q, want = ready(m), ready(same)
    assert q.head.input_quantizer.signed is False and torch.equal(to_integer(q, X)(X), to_integer(want, X)(X))
    same.load_state_dict(m.state_dict()); quantize(same, 8, 8, verbose=False).load_state_dict(q.state_dict())
    assert to_integer(q, X)(X[:3]).shape == (3, 5)

def test_constants_made_in_forward():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__(); self.register_buffer('mean', torch.tensor([.4, .5, .6]))
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        def forward(self, x):
            x = (x - self.mean.view(1, 3, 1, 1))/torch.tensor([.2, .3, .4]).view(1, 3, 1, 1)
            x = self.a(x).relu()
            return self.head((self.b(x) + x).relu().mean((2, 3)))
    class Frozen(nn.Module):
        def __init__(self): super().__init__(); self.a, self.n, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), FrozenBatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        def forward(self, x): x = self.n(self.a(x)).relu(); return self.head((self.b(x) + x).relu().mean((2, 3)))
    for m in Normalised(), Frozen():
        s = calibrate(quantize_sums(quantize(m, 8, 8, verbose=False)), [X]).eval()
        assert error(s(X), m(X)) < .03
        copy.deepcopy(s).load_state_dict(s.state_dict())
        ints = to_integer(ready(m), X)
        assert error(ints(X), m(X)) < .03 and not any(s.op == 'float' for s in ints.steps)
    m = Normalised(); s = quantize_sums(quantize(m, 8, 8, verbose=False)); m.mean.fill_(9.); s.mean.copy_(m.mean)   # a buffer stays one
    calibrate(s, [X]).eval()
    assert error(s(X), m(X)) < .03

class NormRelu(nn.BatchNorm2d):
    def forward(self, x): return F.relu(super().forward(x))
class NormAct(nn.BatchNorm2d):
    "As timm has it: functional, with children"
    def __init__(self, n): super().__init__(n); self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)
    def forward(self, x):
        torch._assert(x.ndim == 4, 'a map')
        if self.training and self.num_batches_tracked is not None: self.num_batches_tracked.add_(1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps) # momentum=None would fail
        return self.act(self.drop(x))
class NormTwice(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x) + x
class NormWide(nn.BatchNorm2d):
    def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, 1.)

@pytest.mark.parametrize('Norm, absorbed', [(NormRelu, True), (NormAct, True), (NormTwice, False), (NormWide, False)])
def test_norms_with_something_inside(Norm, absorbed, capsys):
    m = randomize(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), Norm(8), nn.Conv2d(8, 8, 3, bias=False), Norm(8), nn.Flatten(), nn.Linear(128, 4))).eval()
    assert (norm_rest(m[1]) is not None) == absorbed
    calibrate(m, [X]) # running statistics that further calibrations find again
    for model in (m, reparametrize(m, RepVGGBlock, verbose=False)):
        assert error(model.eval()(X), m(X)) < 1e-4
        q = ready(model)
        d = deploy(q)
        assert error(q(X), m(X)) < .05 and error(d(X), m(X)) < .05
        assert sum(isinstance(b, nn.BatchNorm2d) for b in d.modules()) == (0 if absorbed else 2)
        ints = to_integer(q, X)
        assert error(ints(X), m(X)) < .05 and any(s.op == 'float' for s in ints.steps) != absorbed
        if absorbed: assert q[2].input_quantizer.signed is False
    with pytest.raises(TypeError, match=Norm.__name__): Block([nn.Sequential(nn.Conv2d(3, 8, 3), Norm(8))])

class StdConv(nn.Conv2d):
    def std(self, w): return (w - w.mean((1, 2, 3), keepdim=True))/(w.std((1, 2, 3), keepdim=True) + 1e-5)
class ByForward(StdConv):
    def forward(self, x): return super()._conv_forward(x, self.std(self.weight), self.bias)
class ByConvForward(StdConv):
    def _conv_forward(self, x, w, b): return super()._conv_forward(x, self.std(w), b)
class ByProperty(nn.Conv2d):
    def __init__(self, *a, **k): super().__init__(*a, **k); self.raw = nn.Parameter(self._parameters.pop('weight').data)
    @property
    def weight(self): return 3*self.raw
class Twist(nn.Linear):
    def forward(self, x): return -super().forward(x)

@pytest.mark.parametrize('C', [ByForward, ByConvForward, ByProperty])
def test_convolutions_that_compute_something_else_are_named(C, capsys):
    m = nn.Sequential(C(3, 8, 3), nn.ReLU(), C(8, 8, 3), nn.Flatten(), nn.Linear(128, 4), nn.ReLU(), Twist(4, 4))
    with pytest.raises(TypeError, match=C.__name__): Block([C(3, 8, 3)])
    q = calibrate(quantize(m, 8, 8), [X]).eval()
    said = capsys.readouterr().out
    assert C.__name__ in said and 'Twist' in said and error(q(X), m(X)) < .05
    assert reparametrize(m, verbose=False, adopt=False)[0].__class__ is C
    assert (reparametrize(m, verbose=False)[0].__class__ is C) == (C is ByProperty) # whose weight is no parameter: others are torch's now
    ints = to_integer(q, X)
    assert error(ints(X), m(X)) < .05 and any(s.op == 'float' for s in ints.steps)

def test_an_instance_with_a_forward_of_its_own():
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    m[2].forward = lambda x: -torch.conv2d(x, m[2].weight)
    q = quantize(m, 8, 8, verbose=False)
    assert type(q[2]) is nn.Conv2d
    with pytest.raises(TypeError): Block([m[2]])

def test_hooks_are_part_of_what_a_layer_gives(capsys):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()
    def inputs_halved(m, args): return (args[0]*.5,)
    def outputs_negated(m, args, y): return -y
    for where in 0, 3, 6:
        for attach in (lambda l: l.register_forward_hook(outputs_negated), lambda l: l.register_forward_pre_hook(inputs_halved), lambda l: l.register_forward_hook(lambda m, a, k, y: y + 1, with_kwargs=True)):
            m = model(); attach(m[where]); calibrate(m, [X])
            q = calibrate(quantize(m, 8, 8), [X]).eval()
            assert 'hooks moved to the new layers' in capsys.readouterr().out
            assert error(q(X), m(X)) < .05 and error(deploy(q, verbose=False)(X), m(X)) < .05 and error(reparametrize(m, verbose=False).eval()(X), m(X)) < 1e-4
            assert error(to_integer(q, X)(X), m(X)) < .05
    m = model(); m[2].register_forward_hook(outputs_negated); calibrate(m, [X])       # on what is no layer
    q = ready(m)
    assert error(q(X), m(X)) < .05
    assert error(to_integer(q, X)(X), m(X)) < .05
    hooked = nn.Conv2d(3, 8, 3); hooked.register_forward_hook(outputs_negated)
    with pytest.raises(TypeError, match='hooks'): Block([nn.Sequential(hooked, nn.BatchNorm2d(8))])

def test_linear_and_batchnorm1d():
    behind = [nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4), nn.BatchNorm1d(4)]
    m = calibrate(randomize(nn.Sequential(nn.Flatten(), *behind)), [X]).eval()
    d = deploy(ready(m), verbose=False)
    assert not any(isinstance(b, nn.BatchNorm1d) for b in d.modules()) and error(d(X), m(X)) < .05 and error(to_integer(ready(m), X)(X), m(X)) < .05
    with pytest.raises(AssertionError, match='BatchNorm1d'): nn.Sequential(*list(d.children())[2:3])(torch.randn(2, 16, 5))
    before = calibrate(randomize(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Dropout(.25), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))), [X]).eval()
    assert error(deploy(ready(before), verbose=False)(X), before(X)) < .05
    ints = to_integer(ready(before), X)
    assert error(ints(X), before(X)) < .05 and [s.op for s in ints.steps].count('affine') == 1

@pytest.mark.parametrize('names', [('c1', 'c3', 'c5'), ('v1', 'v2'), ('x', 'y'), ('grids', 'conv'), ('add', 'relu'), ('input', 'output'), ('weight', 'bias_'), ('mean', 'mean_1'), ('const', 'value')])
def test_any_name_of_a_layer_works(names, tmp_path):
    from repq.export import onnx_session, run_onnx, to_onnx
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for i, n in enumerate(names): self.add_module(n, nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1))
            self.out = nn.Linear(8, 3)
        def forward(self, x):
            for n in names: x = F.relu(getattr(self, n)(x))
            return self.out((x + x).mean((2, 3)))
    for q in (ready(Net(), bits=4), calibrate(quantize_sums(quantize(Net(), 4, 4, verbose=False)), [X]).eval()):
        ints = to_onnx(q, tmp_path/'net.onnx', X)
        assert torch.equal(run_onnx(onnx_session(tmp_path/'net.onnx'), X), ints(X))

def test_layers_are_left_out(capsys):
    m = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, (4, 1), padding='same'), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    for kw, left in ((dict(), '2'), (dict(where=lambda n, m: n != '4'), '2'), (dict(layer_bits={'4': None}), '2'), (dict(layer_bits={'4': (None, None)}), '2')):
        q = quantize(m, 4, 4, adopt=False, **kw)
        said = capsys.readouterr().out
        assert type(q[2]) is nn.Conv2d and "padding='same' is asymmetric" in said and (type(q[4]) is nn.Conv2d) == bool(kw)
        if kw: assert '4 (left out)' in said
        calibrate(q, [X])
    with pytest.raises(ValueError, match='2 to 16'): quantize(m, layer_bits={'4': 32})
    with pytest.raises(ValueError, match="no layer 'z'"): quantize(m, layer_bits={'z': None})

def test_tied_weights_stay_tied_or_are_named(capsys):
    m = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 4))
    m[4].weight = m[2].weight
    q = calibrate(quantize(m, 4, 4), [X])
    assert '2 = 4' in capsys.readouterr().out and tied(q) == {'2': ['4'], '4': ['2']}
    opt = torch.optim.SGD(q.parameters(), lr=.1); q.train()(X).square().mean().backward(); opt.step()
    assert torch.equal(q[2].block.kernel().weight, q[4].block.kernel().weight)
    deploy(q); assert 'tied weights become copies: 2 = 4' in capsys.readouterr().out
    r = reparametrize(m)
    assert "shares its weight" in capsys.readouterr().out and r[2].weight is r[4].weight
    shared = nn.Conv2d(8, 8, 3, padding=1)              # one module in two places stays one
    m = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), shared, nn.ReLU(), shared)
    q = quantize(m, 4, 4, verbose=False); assert q[1] is q[3]
    assert reparametrize(m, verbose=False)[1] is not None

def test_a_trace_that_is_not_the_model_is_refused():
    class Otherwise(nn.Module):
        "Computes something else when it is traced"
        def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        def forward(self, x): return self.b(self.a(x).relu() if isinstance(x, torch.fx.Proxy) else self.a(x))
    q = calibrate(quantize(Otherwise(), 8, 8, verbose=False, first_last_bits=None), [X])
    q.b.input_quantizer = copy.deepcopy(q.a.input_quantizer)      # a sign that both can have
    with pytest.raises(ValueError, match='part from the model|trace of the model'): to_integer(q, X)

def test_quantize_says_what_will_not_become_integers(capsys):
    m = net(lambda s, x: rest(s, F.softmax(s.stem(x), 1)))
    quantize(m, 8, 8)
    said = capsys.readouterr().out
    assert '1 operation will be computed in floating point' in said and 'softmax' in said and 'test_graphs.py' in said
    quantize(net(statement), 8, 8)
    assert 'floating point' not in capsys.readouterr().out
    quantize(torchvision.models.resnet18(), 8, 8); assert 'floating point' not in capsys.readouterr().out

def test_lists_of_pieces():
    "`list(x.chunk(2, 1))` and what is done with it, as in the YOLO family"
    class Pieces(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 1)
        def forward(self, x):
            y = list(self.a(x).chunk(2, 1))
            y.extend(self.b(y[-1]) for _ in range(1))
            return torch.cat(y + list(x.split([1, 3], 1)), 1)
    m, x = Pieces().eval(), torch.randn(2, 4, 5, 5)
    assert torch.equal(graph_module(m, trace_graph(m, False))(x), m(x))
