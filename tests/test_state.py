"State lives in tensors: copies, averages, broadcasts and files carry it; evaluation changes nothing. And calibration of models as people have them."
import copy, pickle, subprocess, sys, warnings, weakref
from collections import OrderedDict, deque
from functools import partial
import pytest, torch, torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from helpers import BN, close, same_state, states
from repq.blocks import RepVGGBlock
from repq.layers import RepQLayer
from repq.layer_report import layer_report, sensitivity
from repq.export import cost
from repq.quantizers import LSQ, min_error_step, positive_step
from repq.surgery import adapt_statistics, calibrate, copy_model, deploy, feed, merge, param_groups, quantize, quantize_sums, reparametrize, train_merged

quiet = dict(verbose=False)
MADE = dict(plain=lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)),
            repq=lambda: nn.Sequential(RepVGGBlock(3, 8), nn.ReLU(), RepVGGBlock(8, 8, stride=2), nn.Flatten(), nn.Linear(128, 4)))

class Signs(nn.Module):
    "Cannot be traced, so that the signs of its inputs are found by the first batch"
    def __init__(self): super().__init__(); self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(128, 4)
    def forward(self, x): return self.head(self.b(self.a(x).relu()).flatten(1)) if x.sum() > -1e9 else x
MADE['signs'] = Signs

def made(kind, **kw):
    torch.manual_seed(0)
    q = quantize(MADE[kind](), 4, 4, **quiet, **kw)
    for m in quantizers(q).values(): m.n_candidates = 20 # time is short, and how good a step is does not matter here
    return q
def images(n=16, seed=0): return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
def quantizers(m): return {n: q for n, q in m.named_modules() if isinstance(q, LSQ)}

def fit(q, follow=lambda i, model: None, steps=5, lr=1e-3):
    opt = torch.optim.SGD(param_groups(q, 0.), lr=lr)
    for i in range(steps):
        F.cross_entropy(q.train()(images(seed=i)), torch.arange(16) % 4).backward()
        opt.step(); opt.zero_grad()
        follow(i, q)
    return q

# Averages that begin before there are steps

DECAY = .9
def timm_v2(ema, model): # all values alike, integers too
    for e, v in zip(ema.state_dict().values(), model.state_dict().values()): e.copy_(DECAY*e + (1 - DECAY)*v)
def timm_v3(ema, model):
    for e, v in zip(ema.state_dict().values(), model.state_dict().values()): e.lerp_(v.to(e), 1 - DECAY) if e.is_floating_point() else e.copy_(v)
def ultralytics(ema, model):
    theirs = model.state_dict()
    for k, e in ema.state_dict().items():
        if e.dtype.is_floating_point: e *= DECAY; e += (1 - DECAY)*theirs[k].detach()
def by_data(ema, model):
    for e, v in zip([*ema.parameters(), *ema.buffers()], [*model.parameters(), *model.buffers()]): e.data.copy_(e.data*DECAY + v.data*(1 - DECAY))
def copied(ema, model):
    for e, v in zip(ema.state_dict().values(), model.state_dict().values()): e.copy_(v)

@pytest.mark.parametrize('kind', MADE)
@pytest.mark.parametrize('average', [timm_v2, timm_v3, ultralytics, by_data])
def test_an_average_that_began_before_the_steps(kind, average):
    "Is in force after every update, evaluated or not meanwhile, and its steps are the average of the steps alone"
    q = made(kind)
    ema, steps = copy.deepcopy(q), []
    def follow(i, model):
        steps.append({n: m.raw_step.detach().clone() for n, m in quantizers(model).items()})
        with torch.no_grad(): average(ema, model); ema.eval()(images()) if i % 2 else None
    fit(q, follow, lr=.02)
    weights = torch.tensor([DECAY**(len(steps) - 1 - i) for i in range(len(steps))])
    for n, m in quantizers(ema).items():
        raw = sum(w*s[n] for w, s in zip(weights, steps))/weights.sum()
        want = positive_step(raw, quantizers(q)[n].init_step)
        torch.testing.assert_close(m.step.detach(), want, rtol=1e-4, atol=0)
        assert (m.signed, m.qn, m.qp) == (quantizers(q)[n].signed, quantizers(q)[n].qn, quantizers(q)[n].qp)
    before = states(ema)
    with torch.no_grad(): y = ema.eval()(10*images())
    same_state(before, states(ema))
    with torch.no_grad(): close(deploy(ema, **quiet)(10*images()), y, 1e-4)
    again = made(kind); again.load_state_dict(ema.state_dict())
    with torch.no_grad(): assert torch.equal(again.eval()(images()), ema(images()))
    assert torch.equal(pickle.loads(pickle.dumps(ema))(images()), ema(images()))

@pytest.mark.parametrize('kind', MADE)
@pytest.mark.parametrize('kw', [{}, dict(use_buffers=True), dict(multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=True), dict(multi_avg_fn=get_swa_multi_avg_fn()),
                                dict(avg_fn=lambda e, v, n: e + (v - e)/(n + 1))])
def test_averages_of_torch(kind, kw):
    "Made before the first batch, updated after it"
    q = made(kind)
    avg = AveragedModel(q, **kw)
    fit(q, lambda i, model: avg.update_parameters(model))
    with torch.no_grad(): y = avg.eval()(images())
    assert y.isfinite().all()
    with torch.no_grad(): close(deploy(avg.module, **quiet)(images()), y, 1e-4)
    for n, m in quantizers(avg.module).items(): assert (m.step > .5*quantizers(q)[n].step).all() and m.signed == quantizers(q)[n].signed

def test_an_average_begun_before_the_first_batch_and_updated_before_it():
    "With all tensors averaged the zeros do not count"
    q = made('signs')
    avg = AveragedModel(q, use_buffers=True)
    avg.update_parameters(q)
    fit(q, lambda i, model: avg.update_parameters(model))
    for n, m in quantizers(avg.module).items(): torch.testing.assert_close(m.step, quantizers(q)[n].step, rtol=.3, atol=0)

@pytest.mark.parametrize('kind', MADE)
@pytest.mark.parametrize('how', ['copy_', 'data', 'load', 'assign', 'swap', 'deepcopy', 'pickle', 'save', 'functional', 'set'])
def test_steps_that_arrive_in_tensors_are_in_force(kind, how, tmp_path):
    q = calibrate(made(kind), [images()]).eval()
    other, x = made(kind).eval(), 10*images()
    with pytest.raises(RuntimeError, match='calibrate'): other(x)
    if how == 'copy_': copied(other, q) if not torch.is_grad_enabled() else torch.no_grad()(copied)(other, q)
    elif how == 'data':
        for o, v in zip([*other.parameters(), *other.buffers()], [*q.parameters(), *q.buffers()]): o.data.copy_(v.data)
    elif how == 'load': other.load_state_dict(q.state_dict())
    elif how == 'assign': other.load_state_dict({k: v.clone() for k, v in q.state_dict().items()}, assign=True)
    elif how == 'swap':
        for o, v in zip([*other.parameters(), *other.buffers()], copy.deepcopy([*q.parameters(), *q.buffers()])): torch.utils.swap_tensors(o, v)
    elif how == 'deepcopy': other = copy.deepcopy(q)
    elif how == 'pickle': other = pickle.loads(pickle.dumps(q))
    elif how == 'save': torch.save(q, tmp_path/'q.pt'); other = torch.load(tmp_path/'q.pt', weights_only=False)
    elif how == 'set':
        for n, m in quantizers(q).items():
            o = other.get_submodule(n)
            o.raw_step, o.init_step, o.qrange = nn.Parameter(m.raw_step.detach().clone()), m.init_step.clone(), m.qrange.clone()
        for (n, p), o in zip(q.named_parameters(), other.parameters()): o.data.copy_(p)
        for b, o in zip(q.buffers(), other.buffers()): o.copy_(b)
    before = states(other)
    if how == 'functional': assert torch.equal(torch.func.functional_call(other, dict(q.state_dict()), (x,)), q(x))
    else: assert torch.equal(other(x), q(x)); assert torch.equal(other.train()(x), q.train()(x))
    if how != 'functional': assert all(torch.equal(v, before[k]) for k, v in states(other).items() if 'step' in k or 'qrange' in k)

def test_values_of_another_grid_are_refused():
    q = LSQ(8); q(images())
    for bits, signed in ((4, True), (4, False), (2, True)):
        other = LSQ(bits, signed); other(images().abs())
        with torch.no_grad(): copied(q, other)
        with pytest.raises(ValueError, match='a quantizer of 8 bits'): q(images())
        with pytest.raises(RuntimeError, match='quantizes to'): LSQ(8, signed).load_state_dict(other.state_dict())

def test_a_sign_that_changes_is_followed():
    "Also where it is written behind the version counter, once anything asks"
    a, b = LSQ(4, None), LSQ(4, None)
    a(images()); b(images().abs())
    assert (a.signed, b.signed) == (True, False)
    with torch.no_grad(): copied(a, b)
    assert (a.signed, a.qp) == (False, 15) and torch.equal(a(images()), b(images()))

RANKS = '''
import gc, sys, torch, torch.nn as nn, torch.distributed as dist
from repq.quantizers import LSQ
from repq.surgery import quantize
class Signs(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(128, 4)
    def forward(self, x): return self.head(self.b(self.a(x).relu()).flatten(1)) if x.sum() > -1e9 else x
def quantizers(m): return {n: q for n, q in m.named_modules() if isinstance(q, LSQ)}
def images(seed): return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
rank, store, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method='file://'+store, rank=rank, world_size=2)
q = quantize(Signs(), 4, 4, verbose=False)
if not rank: q.load_state_dict(torch.load(store + '.pt'))
if how == 'ddp': model = nn.parallel.DistributedDataParallel(q)
else:
    model = q
    for t in q.state_dict().values(): dist.broadcast(t, 0)
assert all(m.initialized for m in quantizers(q).values())
steps = {n: m.step.detach().clone() for n, m in quantizers(q).items()}
model.train()(images(seed=rank)).square().mean().backward()
assert all(torch.equal(m.step, steps[n]) for n, m in quantizers(q).items())
all_steps = [None, None]; dist.all_gather_object(all_steps, steps)
assert all(torch.equal(all_steps[0][n], all_steps[1][n]) for n in steps)
del model; gc.collect() # what holds on to the group keeps gloo's threads running into the end of Python, which aborts then
dist.destroy_process_group()
'''

@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == 'win32', reason='needs torch.distributed with gloo')
@pytest.mark.parametrize('how', ['ddp', 'broadcast'])
def test_one_process_loads_and_the_others_get_it(tmp_path, how):
    torch.save(calibrate(made('signs'), [images()]).state_dict(), f'{tmp_path}/store.pt')
    procs = [subprocess.Popen([sys.executable, '-c', RANKS, str(r), f'{tmp_path}/store', how], stderr=subprocess.PIPE, text=True) for r in range(2)]
    try: out = [p.communicate(timeout=200)[1] for p in procs]
    finally: [p.kill() for p in procs]
    assert [p.returncode for p in procs] == [0, 0], out

@pytest.mark.parametrize('kind', MADE)
def test_compiled_and_exported(kind):
    "Also right after values arrived"
    q = calibrate(made(kind), [images()]).eval()
    other = made(kind)
    with torch.no_grad(): copied(other, q)
    other.eval()
    torch._dynamo.reset()
    twin = torch.compile(other, backend='eager')
    with torch.no_grad(): torch.testing.assert_close(twin(images()), q(images()))
    if kind != 'signs':
        again = made(kind)
        with torch.no_grad(): copied(again, q); torch.testing.assert_close(torch.export.export(again.eval(), (images(),)).module()(images()), q(images()))
    unset = torch.compile(made(kind).eval(), backend='eager')
    with pytest.raises(RuntimeError, match='calibrate'): unset(images())

def test_meta():
    q = calibrate(made('plain'), [images()]).eval()
    meta = copy.deepcopy(q).to('meta')
    assert meta(images().to('meta')).shape == (16, 4)
    meta.load_state_dict(q.state_dict(), assign=True)
    assert torch.equal(meta(images()), q(images()))
    with torch.device('meta'): empty = quantize(MADE['plain'](), 4, 4, **quiet).eval()
    empty.load_state_dict(q.state_dict(), assign=True)
    assert torch.equal(empty(images()), q(images()))

# Evaluation changes nothing

@pytest.mark.parametrize('kind', MADE)
@pytest.mark.parametrize('kw', [{}, dict(input_noise=True), dict(bound_steps=True), dict(per_channel=False), dict(statistics='estimated')])
@pytest.mark.parametrize('grad', [False, True])
def test_evaluation_sets_no_step(kind, kw, grad):
    q = made(kind, **kw).eval()
    before = states(q)
    for mode in (torch.set_grad_enabled(grad), torch.inference_mode(not grad)):
        with mode, pytest.raises(RuntimeError, match=r'calibrate\(model, batches\)'): q(images())
    same_state(before, states(q))
    cost(q, images()); same_state(before, states(q))
    calibrate(q, [images()])
    before = states(q)
    with torch.set_grad_enabled(grad): q(5*images())
    same_state(before, states(q))

def test_a_frozen_part_in_evaluation_mode():
    "Takes no step from a training batch, and one from calibrate"
    q = made('plain').train(); q[0].eval(); q[1].eval()
    with pytest.raises(RuntimeError, match='calibrate'): q(images())
    stats = q[1].running_mean.clone()
    calibrate(q, [images()])
    assert all(m.initialized for m in quantizers(q).values()) and torch.equal(q[1].running_mean, stats)
    assert q.training and not q[0].training and not q[1].training
    q(images()).sum().backward()

def test_sums_without_steps():
    class Residual(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)
        def forward(self, x): y = self.a(x).relu(); return self.head((self.b(y) + y).relu().mean((2, 3)))
    q = quantize_sums(quantize(reparametrize(Residual(), **quiet), 4, 4, statistics='estimated', **quiet)).eval()
    with pytest.raises(RuntimeError, match='calibrate'): q(images())
    adapt_statistics(q, [images()])
    assert not any(m.initialized for m in quantizers(q).values())
    assert cost(q, images())['macs'] > 0
    calibrate(q, [images()])
    assert all(m.initialized for m in quantizers(q).values()) and len(quantizers(q)) > 6

# Models that were used

def small(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))

class Stores(nn.Module):
    "Keeps what it computed"
    def __init__(self, how): super().__init__(); self.net, self.how = small(), how
    def forward(self, x):
        y = self.net[:3](x)
        if self.how == 'tensor': self.last = y
        elif self.how == 'list': self.last = [y, [y]]
        elif self.how == 'dict': self.last = OrderedDict(a=dict(b=(y, 3)))
        elif self.how == 'deque': self.last = deque([y], 3)
        elif self.how == 'object': self.last = type('Record', (), {})(); self.last.y = y
        elif self.how == 'partial': self.last = partial(torch.add, y)
        elif self.how == 'inner': self.net[0].seen = {'y': y}
        elif self.how == 'buffer': self.net[0].register_buffer('seen', y, persistent=False)
        return self.net[3:](y)

def with_(f):
    def make():
        m = small()
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); f(m)
        return m
    return make

USED = {**{how: partial(Stores, how) for how in ('tensor', 'list', 'dict', 'deque', 'object', 'partial', 'inner', 'buffer')},
        'pruned': with_(lambda m: prune.l1_unstructured(m[3], 'weight', .5)), 'pruned linear': with_(lambda m: prune.random_unstructured(m[5], 'weight', .5)),
        'pruned bias': with_(lambda m: prune.l1_unstructured(m[3], 'bias', .5)), 'pruned norm': with_(lambda m: prune.l1_unstructured(m[1], 'weight', .5)),
        'pruned first': with_(lambda m: prune.ln_structured(m[0], 'weight', .5, 2, 0)),
        'weight_norm': with_(lambda m: nn.utils.weight_norm(m[3])), 'spectral_norm': with_(lambda m: nn.utils.spectral_norm(m[3])),
        'new weight_norm': with_(lambda m: parametrizations.weight_norm(m[3])), 'new spectral_norm': with_(lambda m: parametrizations.spectral_norm(m[3])),
        'orthogonal': with_(lambda m: parametrizations.orthogonal(m[5])), 'frozen': with_(lambda m: [p.requires_grad_(False) for p in m[:2].parameters()])}
COMPUTED = {'pruned': '3', 'pruned linear': '5', 'pruned bias': '3', 'pruned first': '0', 'weight_norm': '3', 'spectral_norm': '3', 'new weight_norm': '3', 'new spectral_norm': '3', 'orthogonal': '5'}

@pytest.mark.parametrize('name', USED)
def test_verbs_on_models_that_were_used(name, capsys):
    "As with inplace=True: what computes its own weight is left and named; the model is as it was; deploying works after a training step"
    def fresh(): torch.manual_seed(0); m = USED[name](); m(images()).sum().backward(); return m
    for verb in reparametrize, train_merged, merge, partial(quantize, weight_bits=4, input_bits=4, first_last_bits=None), deploy:
        m = fresh(); before = states(m)
        got = verb(m); said = capsys.readouterr().out
        same_state(before, states(m)); assert got is not m
        same_state(states(got), states(verb(fresh(), inplace=True, verbose=False)))
        if name in COMPUTED and getattr(verb, 'func', verb) in (reparametrize, quantize) and not (verb is reparametrize and name in ('pruned linear', 'orthogonal')):
            assert f'left: {COMPUTED[name]} (a ' in said and 'computes its' in said
            assert type(got.get_submodule(COMPUTED[name])) is type(m.get_submodule(COMPUTED[name]))
    q = calibrate(quantize(reparametrize(fresh(), **quiet), 8, 8, **quiet), [images()])
    q.train()(images()).sum().backward(); torch.optim.SGD(q.parameters(), 1e-3).step(); q.train()(images())
    with torch.no_grad(): close(deploy(q, **quiet)(images()), q.eval()(images()), 1e-3)
    for f in (cost, layer_report): before = states(q); f(q, images()); same_state(before, states(q))
    sensitivity(q, lambda m: 0., [images()])


def test_a_copy_shares_nothing():
    m = Stores('dict'); m(images())
    twin = copy_model(m)
    a, b = m.last['a']['b'][0], twin.last['a']['b'][0]
    assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and b.is_leaf and not a.is_leaf
    assert not {p.data_ptr() for p in m.parameters()} & {p.data_ptr() for p in twin.parameters()}
    with torch.inference_mode(): m(images())
    copy_model(m)
    m.file = (i for i in range(3))
    with pytest.raises(ValueError, match='inplace=True'): quantize(m, **quiet)
    quantize(m, inplace=True, **quiet)

def test_blocks_with_pruned_branches_are_left(capsys):
    m = MADE['repq']()
    prune.l1_unstructured(next(c for c in m[0].modules() if isinstance(c, nn.Conv2d)), 'weight', .5)
    assert type(quantize(m)[0]) is RepVGGBlock and 'left: 0 (a hook computes its weight)' in capsys.readouterr().out

# What calibrate does to norms, and with what

def test_frozen_norms_and_norms_that_nothing_reaches():
    def of(part): return [part.running_mean.clone(), part.running_var.clone(), part.num_batches_tracked.clone(), part.momentum]
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norms = nn.Conv2d(3, 4, 3), nn.ModuleDict({n: nn.BatchNorm2d(4) for n in ('free', 'frozen', 'asleep', 'unreached', 'untracked', 'halves')})
            self.norms['untracked'] = nn.BatchNorm2d(4, track_running_stats=False)
            self.block, self.head = RepVGGBlock(4, 4), nn.Linear(4, 2)
        def forward(self, x):
            x = self.stem(x)
            for n, m in self.norms.items(): x = m(x) if n != 'unreached' or len(x) == 99 else x
            return self.head(self.block(x).relu().mean((2, 3)))
    m = quantize(Net(), 4, 4, **quiet).train()
    for bn in m.modules():
        if isinstance(bn, BN) and bn.running_mean is not None: nn.init.uniform_(bn.running_mean); bn.num_batches_tracked.fill_(7)
    m.norms['frozen'].requires_grad_(False); m.norms['asleep'].eval(); m.norms['halves'].weight.requires_grad_(False)
    m.block.block.branches['dense'].bn.requires_grad_(False)
    before = {n: of(b) for n, b in m.named_modules() if isinstance(b, BN) and b.running_mean is not None}
    modes = {n: b.training for n, b in m.named_modules()}
    data = [images(8, i) for i in range(3)]
    calibrate(m, data)
    assert modes == {n: b.training for n, b in m.named_modules()}
    for n, old in before.items():
        now, kept = of(m.get_submodule(n)), any(w in n for w in ('frozen', 'asleep', 'unreached', 'dense'))
        assert [torch.equal(a, b) for a, b in zip(old[:2], now[:2])] == [kept]*2, n
        assert now[2] == (7 if kept else 3) and now[3] == old[3], n
    before = states(m)
    with pytest.raises(Exception): calibrate(m, [*data, images()[:, :2]])
    same_state(before, states(m)); assert modes == {n: b.training for n, b in m.named_modules()}

def test_steps_are_those_of_evaluation():
    "Dropout and stochastic depth are off, in training mode or not"
    def net(p, depth): torch.manual_seed(0); return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(p), torchvision.ops.StochasticDepth(depth, 'batch'), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Dropout2d(p), nn.Flatten(), nn.Linear(128, 4))
    want = states(calibrate(quantize(net(0., 0.), 4, 4, **quiet), [images()]))
    for mode in True, False:
        same_state(want, states(calibrate(quantize(net(.5, .9).train(mode), 4, 4, **quiet), [images()])))
    frozen = net(.5, .9); nn.init.uniform_(frozen[1].running_mean); frozen[1].requires_grad_(False)
    q = calibrate(quantize(frozen, 8, 8, **quiet), [images()]).eval()
    with torch.no_grad(): torch.testing.assert_close(q[5].input_quantizer.step, min_error_step(q[:5](images()), 0, 255))

@pytest.mark.parametrize('kind', ['plain', 'repq'])
def test_one_batch_at_a_time(kind):
    most = 0
    def stream(n):
        nonlocal most
        refs = []
        for i in range(n):
            x = images(8, i); refs.append(weakref.ref(x))
            most = max(most, sum(r() is not None for r in refs))
            yield x
            del x
    class Again:
        def __iter__(self): return stream(12)
    calibrate(made(kind, statistics='estimated' if kind == 'repq' else None), Again())
    assert most <= 2
    calibrate(made(kind), stream(12))
    assert most <= 3 # the first batch and the last

def test_iterators():
    "The same as from a list; read once; an empty one is an error"
    data = [images(8, i) for i in range(3)]
    want = states(calibrate(made('plain'), data))
    for once in (lambda: (x for x in data), lambda: iter(data), lambda: map(lambda x: x, data), lambda: zip(data, data)):
        same_state(want, states(calibrate(made('plain'), once())))
    spent = iter(data); list(spent)
    with pytest.raises(ValueError, match='at least one batch'): calibrate(made('plain'), spent)
    q = calibrate(made('repq', statistics='estimated'), iter(data))
    assert not any(m.switching for m in q.modules() if isinstance(m, RepQLayer)) and all(m.initialized for m in quantizers(q).values())
    for wrong in (images(), 'abc', dict(x=images()), None, 3):
        with pytest.raises(TypeError, match='iterable of batches'): calibrate(made('plain'), wrong)

# How batches enter models

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.head = RepVGGBlock(3, 4), nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
    def forward(self, image, depth): return self.head((self.a(image) + self.b(depth)).relu().mean((2, 3)))
class Named(nn.Module):
    def __init__(self): super().__init__(); self.net = nn.Sequential(RepVGGBlock(3, 4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    def forward(self, pixel_values=None, labels=None, *, return_dict=False): return self.net(pixel_values)
class Keywords(Named):
    def forward(self, **kw): return self.net(kw['pixel_values'])
class Takes(Named):
    def forward(self, batch): return self.net(batch['image'])

X, Y = images(8), torch.arange(8) % 2
BATCHES = [(Two, (X, X, Y), None), (Two, [X, X], None), (Two, ((X, X), Y), None), (Two, [[X, X], Y], None), (Two, dict(image=X, depth=X, name=Y), None), (Two, (dict(image=X, depth=X), Y), None),
           (Named, dict(pixel_values=X, labels=Y), None), (Named, dict(pixel_values=X, other=Y), None), (Named, (X, Y), None), (Named, X, None), (Named, [X], None), (Keywords, dict(pixel_values=X, labels=Y), None),
           (Takes, dict(image=X), lambda m, b: m(b)), (Two, (Y, X), lambda m, b: m(b[1], depth=b[1])), (lambda: nn.Sequential(RepVGGBlock(3, 3)), (X, Y, Y), None)]

@pytest.mark.parametrize('i', range(len(BATCHES)))
def test_batches_as_loaders_give_them(i):
    make, batch, forward = BATCHES[i]
    adapt_statistics(make(), [batch]*2, forward)
    q = calibrate(quantize(make(), 4, 4, statistics='estimated', **quiet), [batch]*2, forward=forward)
    assert all(m.initialized for m in quantizers(q).values())
    sensitivity(q, lambda m: 0., [batch], forward)
    q.eval()
    for wrapped in (nn.DataParallel(q), AveragedModel(q), *([torch.compile(q, backend='eager')] if i == 0 else [])):
        if forward is None: assert torch.equal(feed(wrapped, batch), feed(q, batch))

@pytest.mark.parametrize('make, batch', [(Two, (X,)), (Two, dict(image=X)), (Two, X[0:0].tolist()), (Takes, dict(image=X)), (Named, dict(image=X)), (Named, (X, Y, Y)), (Two, dict(a=X)), (lambda: nn.Conv2d(3, 4, 3), [X[0], X[1]])])
def test_unclear_batches_are_refused(make, batch):
    with pytest.raises(ValueError, match='give forward='): feed(make(), batch)

DETECTORS = dict(ssdlite=lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3),
                 fcos=lambda: torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=32, max_size=48))

@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(name):
    "Targets or none, lists or tuples; nothing of training is run"
    pics = [torch.rand(3, 32, 32), torch.rand(3, 32, 40)]
    targets = [dict(boxes=torch.tensor([[5., 5, 30, 30]]), labels=torch.tensor([1]))]*2
    q = quantize(DETECTORS[name]().train(), 8, 8, **quiet)
    for m in q.modules():
        if isinstance(m, LSQ): m.n_candidates = 10
    with pytest.raises(RuntimeError, match='calibrate'): q.eval()(pics)
    calibrate(q.train(), [(pics, targets), tuple(zip(*zip(pics, targets))), pics])
    assert q.training and all(m.initialized for m in quantizers(q).values())
    with torch.no_grad(): assert len(q.eval()(pics)) == 2

# Learners and optimizers

def learner(model=None, n_inp=1, loss=None, **kw):
    from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner
    from torch.utils.data import TensorDataset
    import repq.learner # noqa: F401 (it patches Learner)
    xs = images(32)
    ds = TensorDataset(*[xs]*n_inp, torch.arange(32) % 2); ds.n_inp = n_inp
    return Learner(DataLoaders.from_dsets(ds, ds, bs=16, device='cpu'), model or MADE['repq'](), loss or CrossEntropyLossFlat(), **kw)

def test_a_learner_with_several_inputs():
    learn = learner(Two(), 2)
    with learn.no_bar(), learn.no_logging():
        learn.reparametrize(verbose=False); learn.quantize(4, 4, **quiet); learn.fit(1, 1e-3)
        learn.calibrate(2); learn.calibrate(1, forward=lambda m, b: m(b[0], b[1]))
        assert all(m.initialized for m in quantizers(learn.model).values())
        close(learn.deploy(verbose=False)(X, X), learn.model.eval()(X, X), 1e-3)

def wrappers():
    from fastai.optimizer import Adam, Lookahead, OptimWrapper, RMSProp, SGD, ranger
    torch_of = lambda cls, **kw: partial(OptimWrapper, opt=cls, **kw)
    return {'sgd': SGD, 'adam': Adam, 'rmsprop': RMSProp, 'ranger': ranger, 'lookahead of sgd': lambda p, lr: Lookahead(SGD(p, lr)), 'torch sgd': torch_of(torch.optim.SGD, momentum=.9), 'torch adamw': torch_of(torch.optim.AdamW),
            'torch adam': torch_of(torch.optim.Adam), 'torch rmsprop': torch_of(torch.optim.RMSprop), 'by hand': lambda p, lr: OptimWrapper(opt=torch.optim.AdamW([dict(params=g) for g in p], lr=lr))}

@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('name', ['sgd', 'adam', 'rmsprop', 'ranger', 'lookahead of sgd', 'torch sgd', 'torch adamw', 'torch adam', 'torch rmsprop', 'by hand'])
def test_optimizers_of_a_learner_leave_steps_alone(name, groups):
    "With gradients of zero only decay moves anything: all weights, no step; the groups stay as many, with their rates, and freezing works"
    def splitter(m):
        if groups == 1: return [list(m.parameters())] if name == 'by hand' else list(m.parameters())
        return [list(m[0].parameters()), list(m[2].parameters()), list(m[4].parameters())]
    learn = learner(MADE['repq'](), opt_func=wrappers()[name], splitter=splitter, loss=lambda out, y: 0*out.sum())
    learn.quantize(4, 4, **quiet)
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit(6, slice(1e-3, 1e-2) if groups > 1 else 1e-2, wd=.5)
    moved = {n for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])}
    weights = {n for n in before if n.endswith(('0.weight', 'linear.weight')) and 'bn' not in n}
    assert weights <= moved and not any(n.endswith('raw_step') for n in moved)
    assert len(learn.opt.param_lists) == groups == len(learn.opt.hypers)
    if groups > 1:
        lrs = [h['lr'] for h in learn.opt.hypers]; assert lrs[0] < lrs[1] < lrs[2]
        learn.freeze(); assert [p.requires_grad for p in learn.model[0].parameters() if p.dim() == 4] == [False]*2
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, wd=.5)

def test_steps_are_trained_by_a_wrapped_optimizer():
    "As by a torch optimizer with the groups of param_groups; what optimizers note in their groups stays"
    class Notes(torch.optim.AdamW):
        def step(self, closure=None):
            for g in self.param_groups: g['taken'] = g.get('taken', 0) + 1
            return super().step(closure)
    learn = learner(calibrate(made('repq'), [images()]), opt_func=wrappers()['torch adamw'])
    from fastai.optimizer import OptimWrapper
    from repq.learner import RepQCallback
    learn.add_cb(RepQCallback()); learn.opt_func = partial(OptimWrapper, opt=Notes)
    before = {n: q.step.detach().clone() for n, q in quantizers(learn.model).items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, wd=.1)
    assert all(not torch.equal(q.step, before[n]) for n, q in quantizers(learn.model).items())
    assert [g['taken'] for g in learn.opt.opt.param_groups] == [4] and not learn.opt.opt._optimizer_step_pre_hooks
    pickle.dumps(learn.rep_q.hooks)

def test_an_optimizer_that_cannot():
    class Odd:
        "Neither fastai's nor torch's"
        def __init__(self, opt): self.opt = opt
        def __getattr__(self, n): return getattr(self.__dict__['opt'], n)
    from fastai.optimizer import SGD
    from repq.learner import RepQCallback
    learn = learner(calibrate(made('repq'), [images()]), cbs=RepQCallback())
    learn.opt = Odd(SGD(list(learn.model.parameters()), 1e-3))
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='Odd is not an optimizer that can leave'): learn.fit(1, 1e-3)

def test_parameter_groups_of_odd_models():
    "Every parameter once, whatever its names; steps, norms and biases without decay"
    m = MADE['repq']()
    m.twice, m.same = nn.Linear(4, 4), nn.Linear(4, 4)
    m.same.weight = m.twice.weight                           # tied
    m.again = m[0]                                           # registered twice
    m.pruned, m.normed = nn.Conv2d(3, 3, 3), parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    prune.l1_unstructured(m.pruned, 'bias', .5); prune.l1_unstructured(m.pruned, 'weight', .5)
    m[2].requires_grad_(False)
    q = quantize(m, 4, 4, **quiet)
    groups = param_groups(q, .1)
    ids = [id(p) for g in groups for p in g['params']]
    assert len(ids) == len(set(ids)) == len(list(q.parameters()))
    free = {id(p) for p in groups[1]['params']}
    for n, p in q.named_parameters(remove_duplicate=False):
        assert (id(p) in free) == (n.endswith(('raw_step', 'bias', 'bias_orig')) or '.bn.' in n or '.identity.' in n), n
    torch.optim.AdamW(groups, 1e-3)
