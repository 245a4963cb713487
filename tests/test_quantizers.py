"The quantizers against stored vectors, against a float64 formula and against autograd, and as modules that are saved and loaded."
import copy, importlib.util, json, math, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from repq.method import minerror
from repq.quantizers import LSQ, check_bits, fake_quantize, grid, min_error_step, positive_step, quantize_to_int

GRIDS = [(b, s) for b in (2, 3, 4, 8) for s in (True, False)]

def reference(v, step, g, qn, qp):
    "Value and both gradients in float64, as the paper writes them"
    v, s, g = v.double(), step.double(), g.double()
    if s.ndim: s = s.view(-1, *[1]*(v.ndim-1))
    u = v/s
    inside = (u >= qn) & (u <= qp)
    q = u.clamp(qn, qp).round()
    per_element = g*torch.where(inside, q-u, q)
    total = per_element.reshape(len(v), -1).sum(1) if step.ndim else per_element.sum()
    return q*s, torch.where(inside, g, 0.), total/math.sqrt(v.numel()/step.numel()*qp)

def run(v, step, g, qn, qp):
    v, step = v.clone().requires_grad_(), step.clone().requires_grad_()
    y = fake_quantize(v, step, qn, qp)
    y.backward(g)
    return y.detach(), v.grad, step.grad

def close(a, b, tol): return (a.double()-b.double()).abs().max().item() <= tol*max(1., b.abs().max().item())

def errors(x, steps, qn, qp): return torch.stack([(x-(x/s).clamp(qn, qp).round()*s).square().sum() for s in steps.double()])

# --- stored vectors

def test_lsq_golden(shared):
    g, z = json.loads((shared/'golden/lsq_per_tensor.json').read_text()), np.load(shared/'golden/lsq_per_tensor.npz')
    assert len(g['configs']) == 6
    for name, c in g['configs'].items():
        def get(key):
            out = g['outputs'][f'{name}/{key}']
            return torch.tensor(z[f'{name}/{key}'] if out.get('npz') else np.float32(out['values']).reshape(out['shape']))
        qn, qp = grid(c['bits'], c['signed'])
        assert (abs(qn), qp) == (c['qn'], c['qp'])
        step_grad = next(k for k in g['outputs'] if k.startswith(f'{name}/grad_s')).split('/')[1]
        for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 2e-6)):
            v, s, up = (get(k).to(dtype) for k in 'vsg')
            y, gv, gs = run(v, s, up, qn, qp)
            assert close(y, get('vhat'), 1e-6) and torch.equal(gv.float(), get('grad_v')) and close(gs, get(step_grad), tol), name

def test_min_error_golden(shared):
    spec = importlib.util.spec_from_file_location('fill', shared/'golden/fill.py')
    fill = importlib.util.module_from_spec(spec); spec.loader.exec_module(fill)
    g = json.loads((shared/'golden/minerror_normal.json').read_text())
    x = torch.tensor(fill.input(g['seed'], g['input_shape'], g['input_kind']))
    for row in g['steps']:
        allowed = [row['step'], *(s for _, s in row['ties'])]
        got = min_error_step(x, *grid(row['bits'], row['signed'])).item()
        assert any(abs(got/a-1) < 1e-5 for a in allowed), (row, got)

# --- values and gradients

@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), signed=st.booleans(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), per_channel=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), last=st.booleans(), seed=st.integers(0, 10**6))
def test_fake_quantize(bits, signed, shape, per_channel, dtype, last, seed):
    gen = torch.Generator().manual_seed(seed)
    qn, qp = grid(bits, signed)
    v, g = (torch.randn(shape, generator=gen).to(dtype) for _ in range(2))
    if last and v.ndim == 4: v = v.contiguous(memory_format=torch.channels_last)
    step = torch.rand(shape[0] if per_channel else (), generator=gen)*2/qp + .01
    s = step.view(-1, *[1]*(v.ndim-1)) if per_channel else step
    wide = v if dtype == torch.float64 else v.float()
    y, gv, gs = run(v, step, g, qn, qp)
    assert y.dtype == gv.dtype == dtype and gs.dtype == torch.float32 and gs.shape == step.shape and y.stride() == v.stride()
    assert torch.equal(y, ((wide/s.to(wide.dtype)).clamp(qn, qp).round()*s.to(wide.dtype)).to(dtype))   # the formula, bit for bit
    assert torch.equal(quantize_to_int(v, step, qn, qp).to(wide.dtype)*s.to(wide.dtype), (wide/s.to(wide.dtype)).clamp(qn, qp).round()*s.to(wide.dtype))
    u = wide/s.to(wide.dtype)                                                     # near a tie or a border float64 may decide otherwise
    if dtype != torch.float64 and ((u-u.floor()-.5).abs() < 1e-4).any(): return
    if dtype != torch.float64 and ((u-qn).abs().min() < 1e-4 or (u-qp).abs().min() < 1e-4): return
    _, rv, rs = reference(v, step, g, qn, qp)
    assert torch.equal(gv.double(), rv) and close(gs, rs, 1e-5)

def test_gradients_at_borders_and_ties():
    "At the ends of the grid an element counts as inside; halves go to the even neighbour"
    v = torch.tensor([-8., 7, -8.2, 7.2, .5, 1.5, -2.5])
    y, gv, gs = run(v, torch.tensor(1.), torch.ones(7), -8, 7)
    assert y.tolist() == [-8, 7, -8, 7, 0, 2, -2] and gv.tolist() == [1, 1, 0, 0, 1, 1, 1]
    assert math.isclose(gs, (0+0-8+7-.5+.5+.5)/math.sqrt(7*7), rel_tol=1e-6)

def test_autograd_agrees():
    v, s = torch.randn(3, 5, dtype=torch.float64), torch.tensor([.1, .3, .7], dtype=torch.float64)
    for bits, signed in GRIDS:
        qn, qp = grid(bits, signed)
        a, b = v.clone().requires_grad_(), s.clone().requires_grad_()
        k = (5*qp)**-.5
        sk = (b*k + (b-b*k).detach())[:,None]
        u = a/sk
        c = torch.where((u >= qn) & (u <= qp), u, u.clamp(qn, qp).detach())
        y = (c + (c.round()-c).detach())*sk
        y.backward(v.cos())
        got = run(v, s, v.cos(), qn, qp)
        assert all(close(x, w, 1e-12) for x, w in zip(got, (y.detach(), a.grad, b.grad)))

def test_only_wanted_gradients_and_autocast():
    v, s = torch.randn(4, 6, requires_grad=True), torch.tensor(.1, requires_grad=True)
    fake_quantize(v, s.detach(), -8, 7).sum().backward(); assert s.grad is None and v.grad is not None
    fake_quantize(v.detach(), s, -8, 7).sum().backward(); assert s.grad is not None
    lin = nn.Linear(6, 3)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        q = LSQ(4)
        y = q(lin(v))
        assert y.dtype == torch.bfloat16 and q.step.dtype == torch.float32
    y.float().sum().backward()
    assert q.raw_step.grad.dtype == torch.float32 and lin.weight.grad.isfinite().all()

# --- MinError

@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), signed=st.booleans(), n=st.sampled_from([1, 7, 300, 70_000]), seed=st.integers(0, 10**6), relu=st.booleans())
def test_min_error_is_the_minimum(bits, signed, n, seed, relu):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if relu: x = x.relu()
    qn, qp = grid(bits, signed)
    s = min_error_step(x, qn, qp, n_candidates=20)
    assert s > 0 and s.shape == () and s.dtype == torch.float32
    if x.max() <= 0: return
    e = errors(x.double(), torch.linspace(1e-7, x.abs().max().item()/qp, 20, dtype=torch.float64), qn, qp)
    assert errors(x.double(), s[None], qn, qp)[0] <= e.min()*(1+1e-4) + 1e-9

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_min_error_per_channel(dtype):
    w = (torch.randn(6, 3, 3, 3)*torch.arange(6).view(-1, 1, 1, 1)).to(dtype)    # channel 0 is all zeros
    for bits, signed in GRIDS:
        s = min_error_step(w, *grid(bits, signed), per_channel=True)
        assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert math.isclose(s[0], w.double().abs().max()/grid(bits, signed)[1], rel_tol=1e-5)
        for o in range(1, 6): assert math.isclose(s[o], min_error_step(w[o], *grid(bits, signed)), rel_tol=1e-6)

def tensors(dtype=torch.float32):
    "Tensors of many kinds, each with enough values to be sorted at 2 bits, most at 8"
    gen = torch.Generator().manual_seed(3)
    normal = torch.randn(20_000, generator=gen, dtype=torch.float64)
    outlier = normal.clone(); outlier[7] = 1e4
    kinds = {'normal': normal, 'relu': normal.relu(), 'uniform': torch.rand(20_000, generator=gen).double(), 'skewed': normal.exp(), 'negative': -normal.abs()-3,
             'few values': (normal*3).round()/7, 'on a grid': (normal*30).round().clamp(-128, 127)*.037, 'midpoints': ((normal*40).round()+.5)/15,
             'constant': torch.full((20_000,), .3), 'two values': torch.tensor([-1., 4.]).repeat(10_000), 'zeros': torch.zeros(20_000), 'outlier': outlier,
             'tiny': normal*1e-12, 'smaller than float32 divides by': normal*1e-38, 'huge': normal*1e30, 'far from zero': normal+1e4, 'one': torch.tensor([.7]),
             'negative one': torch.tensor([-2.]), 'short': normal[:1000], 'float16': normal.half(), 'heavy tails': normal/normal.roll(1), 'cancelling': torch.cat([normal*1e4, -normal*1e4])}
    return {k: v.to(dtype) for k, v in kinds.items()}

def direct_choice(x, qn, qp, n=300):
    "(candidates, errors of each in double precision, element by element): what MinError minimizes"
    size = x.double().abs().max().item()
    if size == 0: size = 1.
    k = torch.linspace(0, 1, n, dtype=torch.float64)
    steps = 1e-7*(1-k) + max(size/qp, 1e-30)*k
    return steps, torch.stack([(x.double()/s).clamp(qn, qp).round().sub(x.double()/s).square().sum()*s**2 for s in steps])

def is_choice(s, x, qn, qp):
    "Is `s` the candidate that the direct sum in double precision chooses (any of those that are as good up to its rounding)?"
    steps, e = direct_choice(x, qn, qp)
    at = (steps.to(s.dtype) == s).nonzero()
    if not len(at): return False
    if x.max() <= 0 and qn == 0: return at[-1].item() == len(steps)-1             # nothing above zero: the largest
    clear = (e > e.min()*(1+1e-13)).sum() == len(e)-1
    return at[0].item() == e.argmin().item() if clear else bool((e[at] <= e.min()*(1+1e-13)).any())

@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
@pytest.mark.parametrize('signed', [True, False])
def test_min_error_chooses_what_the_direct_sum_chooses(bits, signed):
    qn, qp = grid(bits, signed)
    for dtype in (torch.float32, torch.float64):
        for kind, x in tensors(dtype).items():
            s = min_error_step(x, qn, qp)
            assert is_choice(s, x, qn, qp), (kind, dtype, s)

def test_min_error_of_16_bits():
    for kind, x in tensors().items():
        for signed in (True, False):
            s = min_error_step(x[:4000], *grid(16, signed))
            assert is_choice(s, x[:4000], *grid(16, signed)), (kind, s)

@pytest.mark.parametrize('bits', [2, 4, 8])
def test_min_error_of_each_channel_is_that_of_the_channel_alone(bits):
    rows = torch.stack([x for x in tensors().values() if len(x) == 20_000])
    for signed in (True, False):
        each = min_error_step(rows, *grid(bits, signed), per_channel=True)
        for s, row in zip(each, rows):
            if row.any(): assert is_choice(s, row, *grid(bits, signed))

def test_sorted_errors_keep_their_bounds():
    "Sums from sorted values, whole and in pieces, lie within their bounds of sums over elements in exact arithmetic"
    from fractions import Fraction
    for kind, x in tensors(torch.float64).items():
        if kind == 'zeros': continue
        x = x[:300]
        for qn, qp in ((-8, 7), (0, 3), (-128, 127)):
            steps = torch.tensor([[.3, .51, 1.]], dtype=torch.float64)*x.abs().max()/qp
            exact = []
            for s in map(Fraction, steps[0].tolist()): exact.append(sum((v - min(max(round(v/s), qn), qp)*s)**2 for v in map(Fraction, x.tolist())))
            for part in (300, 64):
                e, bound = minerror._sorted_errors(x[None], steps, qn, qp, part=part)
                for got, b, want in zip(e[0].tolist(), bound[0].tolist(), exact): assert abs(Fraction(got)-want) <= Fraction(b), (kind, qn, part)
            for dtype in (torch.float32, torch.float64):
                if dtype == torch.float32 and not x.float().double().equal(x): continue
                e, bound = minerror._errors(x[None].to(dtype), steps, qn, qp)
                for got, b, want in zip(e[0].tolist(), bound[0].tolist(), exact): assert abs(Fraction(got)-want) <= Fraction(b), (kind, qn, dtype)

def test_min_error_in_pieces(monkeypatch):
    "Tensors that are sorted in several pieces have the step of the whole"
    whole = {k: min_error_step(x, -8, 7) for k, x in tensors().items()}
    monkeypatch.setattr(minerror._sorted_errors, '__defaults__', (1500,))
    for kind, x in tensors().items(): assert torch.equal(min_error_step(x, -8, 7), whole[kind]), kind

def test_min_error_bad_input():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match='qn=8'): min_error_step(x, 8, 7)
    with pytest.raises(ValueError, match='empty'): min_error_step(x[:0], -8, 7, per_channel=True)
    with pytest.raises(ValueError, match='non-finite'): min_error_step(x/0, -8, 7)
    with pytest.raises(TypeError, match='int64'): min_error_step(x.long(), -8, 7)
    with pytest.raises(ValueError, match='overflow'): min_error_step(x.double()*1e200, -8, 7)
    for bits in (1, 17, 4., True, '4'):
        with pytest.raises(ValueError, match='from 2 to 16'): check_bits(bits)

# --- the module

def test_positive_step():
    raw, init = torch.linspace(-2, 3, 60, dtype=torch.float64, requires_grad=True), torch.full((60,), .9, dtype=torch.float64)
    s = positive_step(raw, init)
    assert (s > 0).all() and torch.equal(s[raw > .45], raw[raw > .45]) and (s.diff() > 0).all()
    assert torch.autograd.gradcheck(positive_step, (raw, init))
    assert (positive_step(torch.tensor([-1e3, -1e30]), torch.full((2,), 1e-6)) > 0).all()

@pytest.mark.parametrize('per_channel', [False, True])
def test_first_tensor_in_training_initializes(per_channel):
    q = LSQ(3, per_channel=per_channel)
    p, w = q.raw_step, torch.randn(5, 2, 3, 3)
    with pytest.raises(RuntimeError, match='calibrate'): q.eval()(w)
    assert not q.initialized
    q.train()
    y = q(w)
    assert q.initialized and q.raw_step is p
    assert torch.equal(q.step, min_error_step(w, -4, 3, per_channel=per_channel)) and torch.equal(y, fake_quantize(w, q.step, -4, 3))
    y.square().sum().backward(); assert p.grad.shape == q.step.shape
    assert torch.equal(q(w*3), fake_quantize(w*3, q.step, -4, 3))                 # later tensors change nothing
    assert torch.equal(q.quantized(w)*(q.step.view(-1, 1, 1, 1) if per_channel else q.step), q(w))

@pytest.mark.parametrize('lo, signed', [(0., False), (-.1, True)])
def test_sign_is_decided_once_and_saved(lo, signed):
    x = torch.rand(100)+lo
    q = LSQ(4, signed=None)
    with pytest.raises(RuntimeError, match='not decided'): q.set_step(.1)
    q(x)
    assert q.signed is signed
    q(x-10); assert q.signed is signed
    other = LSQ(4, signed=None); other.load_state_dict(q.state_dict())
    assert other.signed is signed and torch.equal(other(x), q(x))

@pytest.mark.parametrize('kw', [{}, dict(per_channel=True), dict(per_channel=True, channels=5), dict(signed=None)])
def test_save_load_and_train_on(kw, tmp_path):
    w = torch.randn(5, 4)
    def train(q, opt, n=3):
        for _ in range(n): opt.zero_grad(); (q(w)-w).square().sum().backward(); opt.step()
    q = nn.Sequential(LSQ(4, **kw)); q(w)
    opt = torch.optim.SGD(q.parameters(), lr=.01, momentum=.9); train(q, opt)
    torch.save([q.state_dict(), opt.state_dict()], tmp_path/'c.pt')
    model, optim = torch.load(tmp_path/'c.pt', weights_only=True)
    new = nn.Sequential(LSQ(4, **kw)); new.load_state_dict(model)
    opt2 = torch.optim.SGD(new.parameters(), lr=.01, momentum=.9); opt2.load_state_dict(optim)
    assert new[0].initialized and torch.equal(new(w), q(w)) and torch.equal(new[0].init_step, q[0].init_step)
    train(q, opt); train(new, opt2)
    assert torch.equal(q[0].raw_step, new[0].raw_step)
    twin = copy.deepcopy(q); assert twin[0].initialized and torch.equal(twin(w), q(w))

@pytest.mark.parametrize('kw', [{}, dict(per_channel=True), dict(per_channel=True, channels=5), dict(signed=None)])
def test_uninitialized_stays_so(kw):
    used = LSQ(4, **kw); used(torch.randn(5, 4))
    for q in (LSQ(4, **kw), used):
        q.load_state_dict(LSQ(4, **kw).state_dict())
        assert not q.initialized and (q.signed is None) == ('signed' in kw)
    assert not copy.deepcopy(used).initialized

def test_checkpoint_that_does_not_fit():
    q = LSQ(4, per_channel=True); q(torch.randn(5, 4))
    for other, message in ((LSQ(8, per_channel=True), '-8..7'), (LSQ(4), 'steps of shape'), (LSQ(4, per_channel=True, channels=6), 'steps of shape'),
                           (LSQ(4, signed=False, per_channel=True), 'this quantizer to 0..15')):
        with pytest.raises(RuntimeError, match=message): nn.Sequential(other).load_state_dict({f'0.{k}': v for k, v in q.state_dict().items()})
        assert not other.initialized

def test_types_of_steps():
    q = nn.Sequential(LSQ(4, per_channel=True)); w = torch.randn(5, 4); q(w)
    for m in (copy.deepcopy(q).half(), copy.deepcopy(q).bfloat16(), copy.deepcopy(q).to(torch.bfloat16)):
        assert torch.equal(m[0].raw_step, q[0].raw_step) and m[0].init_step.dtype == torch.float32
    d = copy.deepcopy(q).double(); assert d[0].step.dtype == torch.float64 and d(w.double()).dtype == torch.float64

def test_bad_first_tensor_changes_nothing():
    for q in (LSQ(4, signed=None), LSQ(4), LSQ(4, per_channel=True)):
        before = {k: v.clone() for k, v in q.state_dict().items()}
        for bad, message in ((torch.randn(4, 2)*math.nan, 'non-finite'), (torch.zeros(0, 2), 'empty')):
            with pytest.raises(ValueError, match=message): q(bad)
        assert not q.initialized and all(torch.equal(v, before[k]) for k, v in q.state_dict().items())

def test_initialized_in_inference_mode_is_trainable():
    q = LSQ(4, per_channel=True); w = torch.randn(3, 4)
    with torch.inference_mode(): q(w)
    q(w).sum().backward(); assert q.raw_step.grad is not None

RANKS = '''
import sys, torch, torch.distributed as dist
from repq.quantizers import LSQ, min_error_step
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method='file://'+store, rank=rank, world_size=2)
x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).abs(); x[1] *= -2
q = LSQ(3, signed=None); q(x[rank])
assert q.signed and torch.allclose(q.step, min_error_step(x, -4, 3), rtol=1e-6), (q, min_error_step(x, -4, 3))
y = torch.randn(3000, generator=torch.Generator().manual_seed(1))
for kind in (y, y.relu()+.1, (y*3).round()/7, y.clone().fill_(.3)):      # few values here, so that one process sorts and the other does not
    for grid in ((-8, 7), (0, 15)):
        assert torch.equal(min_error_step(kind[:100] if rank else kind[100:], *grid, over_ranks=True), min_error_step(kind, *grid)), grid
try: LSQ(3)(x[rank]*(float('nan') if rank else 1)); raise SystemExit('nan went through')
except ValueError: pass
dist.destroy_process_group()
'''

@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == 'win32', reason='needs torch.distributed with gloo')
def test_ranks_start_alike(tmp_path):
    "Two processes with different batches, of which only one has negative values, find the step of both batches together"
    procs = [subprocess.Popen([sys.executable, '-c', RANKS, str(r), str(tmp_path/'store')], stderr=subprocess.PIPE, text=True) for r in range(2)]
    try: out = [p.communicate(timeout=100)[1] for p in procs]
    finally: [p.kill() for p in procs]
    assert [p.returncode for p in procs] == [0, 0], out

@pytest.mark.parametrize('draw', [torch.randn, torch.rand, lambda *s: torch.randn(*s).relu(), lambda *s: torch.randn(*s)**5, lambda *s: torch.randint(-9, 9, s)/9., lambda *s: torch.zeros(s).index_fill(1, torch.tensor([3]), 1.)],
                         ids='normal uniform relu heavy few-values one-value'.split())
@pytest.mark.parametrize('qn,qp', [(-128, 127), (0, 255), (-256, 255)])
def test_candidates_that_are_left_out_are_worse(draw, qn, qp):
    "The best and its equals stay, by the definition in double precision"
    torch.manual_seed(0)
    x = draw(1, 2**15)
    steps = torch.linspace(1e-7, float(x.abs().max())/qp, 300, dtype=torch.float64)[None]
    few, err = minerror._promising(x, steps, qn, qp), minerror._direct_errors(x, steps, qn, qp)
    assert set(steps[err == err.min()].tolist()) <= set(few[0].tolist()) and few.shape[1] < 300
    if minerror._prunes(x, qn, qp, False): assert minerror.min_error_step(x, qn, qp) in few.float()

def test_overflowing_squares_are_refused_with_fewer_candidates_too():
    with pytest.raises(ValueError, match='overflow'): minerror.min_error_step(torch.full((1, 2**15), 1e300, dtype=torch.float64).mul(torch.linspace(.1, 1, 2**15)), -128, 127)
