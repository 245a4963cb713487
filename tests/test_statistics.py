"The five statistics: what each promises, for any geometry."
import math, subprocess, sys
import pytest, torch, torch.nn as nn
from hypothesis import assume, given, settings, strategies as st
from helpers import BN, cases, close, randomize
from repq.batchnorm import STATISTICS, Moments, corrected_stats, estimated_stats, exact_stats, fold, get_statistics, hybrid_stats, normalize, sample_patches, sampled_stats, statistics_in
from repq.blocks import ACBlock, RepVGGBlock
from repq.kernels import Geometry, Kernel
from repq.method.sampling import _grid_step, _thinned
from repq.bench import held_bytes
from repq.layers import RepQLayer

def kernel_of(c, bias=True):
    torch.manual_seed(c.seed)
    w = torch.randn(c.outs, c.ins//c.groups, *c.kernel_size).to(c.dtype)
    return Kernel(w, torch.randn(c.outs).to(c.dtype) if bias else None, c.groups)

def naive(x, k, g):
    "Mean and biased variance of torch's own convolution"
    y = k.conv(x.double(), g)
    return y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)

@settings(max_examples=60)
@given(cases(), st.booleans())
def test_exact(c, bias):
    k = kernel_of(c, bias)
    for a, b in zip(exact_stats(c.input(), k, c.geometry), naive(c.input(), Kernel(k.weight.double(), None if k.bias is None else k.bias.double(), k.groups), c.geometry)):
        close(a, b, c.tol)
        assert a.dtype == c.dtype

@settings(max_examples=60)
@given(cases(), st.booleans())
def test_corrected_mean_is_exact(c, bias):
    "The mean for every geometry; the variance is the estimate's"
    k, x = kernel_of(c, bias), c.input(shift=2.)
    mean, var = corrected_stats(x, k, c.geometry)
    close(mean, exact_stats(x, k, c.geometry)[0], c.tol)
    assert torch.equal(var, estimated_stats(x, k, c.geometry)[1])

@settings(max_examples=40)
@given(cases(), st.booleans())
def test_estimated_is_the_papers_formula(c, bias):
    "(5) and (6), written as the sums that they are"
    k, x = kernel_of(c, bias), c.input(shift=2.)
    mean, var = estimated_stats(x, k, c.geometry)
    per = c.ins//c.groups
    for o in range(c.outs):
        first = o//(c.outs//c.groups)*per
        channels = [x[:, first + i].double() for i in range(per)]
        m = sum(v.mean().item()*k.weight[o, i].double().sum().item() for i, v in enumerate(channels)) + (k.bias[o].item() if bias else 0)
        v = sum(v.var(unbiased=False).item()*(k.weight[o, i].double()**2).sum().item() for i, v in enumerate(channels))
        assert math.isclose(mean[o], m, rel_tol=c.tol*10, abs_tol=c.tol*10) and math.isclose(var[o], v, rel_tol=c.tol*10)

@settings(max_examples=20)
@given(cases())
def test_estimate_is_exact_for_single_pixels_of_uncorrelated_channels(c):
    "(3): nothing is neglected for a depthwise 1×1"
    x, w = c.input(), torch.randn(c.ins, 1, 1, 1).to(c.dtype)
    k = Kernel(w, None, c.ins)
    for f in estimated_stats, corrected_stats:
        for a, b in zip(f(x, k), exact_stats(x, k)): close(a, b, c.tol*10)

@settings(max_examples=40)
@given(cases())
def test_sampled_equals_exact_where_everything_is_sampled(c):
    "Where the map is small, or there are few images"
    k, x = kernel_of(c), c.input()
    assume(not _thinned(x, k, c.geometry))
    for a, b in zip(sampled_stats(x, k, c.geometry), exact_stats(x, k, c.geometry)): close(a, b, c.tol*10)

def edge_kernel(): return Kernel(torch.tensor([[[[1., 0, 0], [2, 0, 0], [0, 0, .5]]]]))

@pytest.mark.parametrize('n,size', [(16, 16), (32, 16), (64, 8), (9, 18), (4, 18)])
@pytest.mark.parametrize('mode', ['zeros', 'circular'])
def test_sampled_is_unbiased(n, size, mode):
    "Over many batches the sampled moments average to the exact ones: whole cycles of phases"
    k, g, errs = edge_kernel(), Geometry(1, 1, 1, mode), []
    for _ in range(150):
        x = torch.randn(n, 1, size, size) + 1     # a mean, so that a zero border shows
        x = x + x.roll(1, 3) + x.roll(1, 2)       # and correlated neighbours
        errs.append(torch.stack([(a - b).squeeze() for a, b in zip(sampled_stats(x, k, g), exact_stats(x, k, g))]))
    errs = torch.stack(errs)
    assert errs.abs().max() > 1e-3, 'nothing was left out'
    z = errs.mean(0)/(errs.std(0)/len(errs)**.5)
    # E[var of a sample] is smaller than var by var/samples, which is below what 150 batches show
    assert z.abs().max() < 4, f'{z} standard errors from the exact mean and variance'

@pytest.mark.parametrize('n,size', [(8, 24), (24, 24)])
def test_sampled_is_unbiased_with_incomplete_cycles(n, size):
    "A border on all sides has no side of its own: the mean of an even input is the exact one within a twentieth of its deviation"
    mean, var = sampled_stats(torch.ones(n, 1, size, size), edge_kernel(), Geometry(1, 1))
    want, v = exact_stats(torch.ones(n, 1, size, size), edge_kernel(), Geometry(1, 1))
    assert (mean - want).abs() < .05*v.sqrt()

@settings(max_examples=30)
@given(st.sampled_from(list(STATISTICS)), st.sampled_from([1, 2, 4]), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 3), st.integers(0, 2), st.sampled_from(['zeros', 'reflect', 'circular']))
def test_groups_are_independent(name, groups, dtype, stride, padding, mode):
    "A grouped kernel is its groups side by side, in every statistic"
    torch.manual_seed(groups)
    k, geo = Kernel(torch.randn(8, 8//groups, 3, 3).to(dtype), torch.randn(8).to(dtype), groups), Geometry(stride, padding, 1, mode)
    x, f = torch.randn(18, 8, 24, 24).to(dtype), get_statistics(name)
    whole = f(x, k, geo)
    parts = [f(a, Kernel(w, b), geo) for a, w, b in zip(x.chunk(groups, 1), k.weight.chunk(groups), k.bias.chunk(groups))]
    for i in 0, 1: close(whole[i], torch.cat([p[i] for p in parts]), 1e-10 if dtype == torch.float64 else 1e-5)

@pytest.mark.parametrize('name', STATISTICS)
def test_identity(name):
    "Statistics of x itself, whichever are asked for"
    x = torch.randn(4, 3, 16, 16)
    for a, b in zip(get_statistics(name)(x, Kernel.identity(3)), naive(x, Kernel.identity(3, dtype=torch.float64), Geometry())): close(a, b, 1e-6)

@pytest.mark.parametrize('name', STATISTICS)
@pytest.mark.parametrize('groups,stride,padding,mode', [(1, 1, 1, 'zeros'), (2, 2, 1, 'reflect'), (1, (1, 2), (2, 0), 'circular'), (2, 1, 1, 'replicate')])
def test_gradients(name, groups, stride, padding, mode):
    "To x, weight and bias"
    x, w, b = torch.randn(2, 2, 4, 5).double().requires_grad_(), torch.randn(4, 2//groups, 3, 3).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    f, geo = get_statistics(name), Geometry(stride, padding, 1, mode)
    assert torch.autograd.gradcheck(lambda x, w, b: f(x, Kernel(w, b, groups), geo), (x, w, b))

def test_gradients_of_a_thinned_map():
    "Where the sampled patches overlap and where an incomplete cycle is added"
    x, w = torch.randn(5, 1, 16, 16).double().requires_grad_(), torch.randn(1, 1, 5, 5).double().requires_grad_()
    assert _grid_step(5, (16, 16)) == 4
    assert torch.autograd.gradcheck(lambda x, w: sampled_stats(x, Kernel(w), Geometry(1, 2)), (x, w), nondet_tol=1e-12)

@pytest.mark.parametrize('name', STATISTICS)
@pytest.mark.parametrize('shift', [100., 1000.])
def test_large_means_in_float32(name, shift):
    x, k, geo = torch.randn(16, 4, 16, 16) + shift, Kernel(torch.randn(6, 4, 3, 3)), Geometry()
    f = get_statistics(name)
    mean, var = f(x, k, geo)
    m, v = f(x.double(), Kernel(k.weight.double()), geo)
    assert ((mean - m).abs() < 1e-2*v.sqrt()).all(), 'the mean is off by more than a hundredth of a standard deviation'
    assert ((var/v - 1).abs() < 1e-2).all() and (var > 0).all()

@pytest.mark.parametrize('name', STATISTICS)
def test_constant_input(name):
    "No variance: not negative, not nan; the batch norm's eps keeps the merged kernel finite"
    layer = RepQLayer(RepVGGBlock(4, 4), statistics=name).train()
    for x in torch.zeros(4, 4, 8, 8), torch.full((4, 4, 8, 8), 123.4):
        var = get_statistics(name)(x, Kernel(torch.randn(4, 4, 3, 3)), Geometry(1, 1))[1]
        assert (var >= 0).all()
        y = layer(x); y.sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())

@pytest.mark.parametrize('name', STATISTICS)
@pytest.mark.parametrize('block', [RepVGGBlock, ACBlock])
def test_autocast_keeps_statistics_in_float32(name, block):
    layer = RepQLayer(randomize(block(4, 4)), statistics=name).train(); layer.switching = False
    twin = RepQLayer(randomize(block(4, 4)), statistics=name).train(); twin.switching = False
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(16, 4, 16, 16)
    layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = twin(x)
        k = twin.block.kernel(x.bfloat16()) # what a layer in the middle of a network gets
    assert y.dtype == torch.bfloat16 and k.weight.dtype == torch.float32
    twin.eval(); layer.eval()
    for m in twin.modules():
        if isinstance(m, BN): assert m.running_var.dtype == torch.float32
    twin.load_state_dict(layer.state_dict()); twin.train(); layer.train()
    layer(x)
    with torch.autocast('cpu', torch.bfloat16): twin(x)
    for (n, a), b in zip(layer.named_buffers(), twin.buffers()): assert torch.equal(a, b), f'{n}: {a} {b}'

@pytest.mark.parametrize('name', STATISTICS)
def test_moments_are_shared(name):
    "`Moments` of x and x itself give the same"
    x, k, geo = torch.randn(16, 4, 16, 16), Kernel(torch.randn(6, 4, 3, 3)), Geometry(1, 1)
    m = Moments(x)
    for _ in range(2):
        for a, b in zip(get_statistics(name)(m, k, geo), get_statistics(name)(x, k, geo)): assert torch.equal(a, b)

@pytest.mark.parametrize('name', STATISTICS)
def test_memory_format_makes_no_difference(name):
    for shape in [(32, 4, 8, 8), (2, 4, 16, 16), (5, 3, 20, 20)]:
        x, k = torch.randn(shape), Kernel(torch.randn(6, shape[1], 3, 3))
        for geo in Geometry(1, 1), Geometry(2, 0):
            want = get_statistics(name)(x, k, geo)
            for odd in x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), torch.cat([x, x], 1)[:, :shape[1]], x.flip(3).flip(3):
                for a, b in zip(get_statistics(name)(odd, k, geo), want): close(a, b, 1e-5)

def test_sampled_channels_last_on_one_position():
    x, k = torch.randn(4, 4, 3, 3), Kernel(torch.randn(6, 4, 3, 3))
    for a, b in zip(sampled_stats(x.to(memory_format=torch.channels_last), k), exact_stats(x, k)): close(a, b, 1e-5)

@pytest.mark.parametrize('name', ['estimated', 'corrected', 'sampled'])
def test_statistics_of_a_half_precision_model(name):
    mean, var = get_statistics(name)(torch.randn(4, 4, 8, 8).bfloat16(), Kernel(torch.randn(4, 4, 3, 3).bfloat16()), Geometry(1, 1))
    assert mean.dtype == var.dtype == torch.float32

@settings(max_examples=30)
@given(cases(dtypes=(torch.float64,)), st.booleans())
def test_rebase(c, ac):
    "After rebase the running statistics are those of x, and evaluation computes what it did"
    block = randomize((ACBlock if ac else RepVGGBlock)(*c.args()), c.seed).double().eval()
    x = c.input()
    with torch.no_grad():
        want = block(x)
        before = {k: v.clone() for k, v in block.state_dict().items()}
        statistics = block.batch_statistics(x)
        for k, v in block.state_dict().items(): assert torch.equal(v, before[k]), 'asking for statistics changes nothing'
        block.rebase(statistics)
        close(block(x), want, 1e-9)
        twin = (ACBlock if ac else RepVGGBlock)(*c.args()).double()
        twin.load_state_dict(block.state_dict())
        for m in twin.modules():
            if isinstance(m, BN): m.momentum = 1.
        twin.train()(x)
    for (n, a), b in zip(block.named_buffers(), twin.buffers()):
        if 'num_batches' not in n: close(a, b, 1e-9, n)

def test_sampled_positions():
    "A whole cycle of images visits every phase of the grid once, at the output's own positions"
    n, size = 16, 16
    assert _grid_step(n, (size, size)) == 4
    where = torch.arange(size*size).view(1, 1, size, size).expand(n, 1, -1, -1).float() # each pixel says where it is
    seen = sample_patches(where, (1, 1), Geometry()).flatten()
    assert torch.equal(seen.sort().values, torch.arange(size*size).float()), 'not every position once'
    stride2 = sample_patches(torch.arange(32*32).view(1, 1, 32, 32).expand(n, 1, -1, -1).float(), (1, 1), Geometry(2)).flatten()
    rows, cols = stride2.long()//32, stride2.long() % 32
    assert (rows % 2 == 0).all() and (cols % 2 == 0).all() and len(stride2.unique()) == 256

@pytest.mark.parametrize('name', [n for n in STATISTICS if n != 'hybrid'])
@pytest.mark.parametrize('stride,mode', [(1, 'zeros'), (2, 'circular')])
def test_gradients_of_large_maps(name, stride, mode):
    "Along a random direction, where the grid is sparse and its last cycle incomplete"
    x, w, geo, f = torch.randn(18, 3, 16*stride, 16*stride).double(), torch.randn(4, 3, 3, 3).double(), Geometry(stride, 1, 1, mode), get_statistics(name)
    dx, dw, r = torch.randn_like(x), torch.randn_like(w), torch.randn(2, 4).double()
    loss = lambda x, w: sum((a*b).sum() for a, b in zip(f(x, Kernel(w), geo), r))
    gx, gw = torch.autograd.grad(loss(x.requires_grad_(), w.requires_grad_()), (x, w))
    with torch.no_grad(): numeric = (loss(x + 1e-5*dx, w + 1e-5*dw) - loss(x - 1e-5*dx, w - 1e-5*dw))/2e-5
    close((gx*dx).sum() + (gw*dw).sum(), numeric, 1e-6)

HYBRID = [(32, 16, 1, Geometry(1, 1), (3, 3)), (16, 32, 2, Geometry(2, 1), (3, 3)), (32, 14, 1, Geometry(1, (1, 0)), (3, 1)), (16, 16, 2, Geometry(1, 2, 2, 'reflect'), (3, 3)), (16, 16, 1, Geometry(1, 2), (5, 5))]

def gradients(f, x, kernel, geometry, upstream):
    "Values, and gradients to x, weight and bias"
    given = [t.detach().clone().requires_grad_() for t in (x, kernel.weight, kernel.bias)]
    mean, var = f(given[0], Kernel(*given[1:], kernel.groups), geometry)
    return (mean.detach(), var.detach()), torch.autograd.grad((upstream[0]*mean + upstream[1]*var).sum(), given)

def hybrid_case(n, size, groups, geometry, kernel_size):
    torch.manual_seed(n + size)
    x = torch.randn(n, 4, size, size).double().cumsum(3)/3 + torch.linspace(0, 1, size).double()    # neighbours alike, columns not
    return x, Kernel(torch.randn(6, 4//groups, *kernel_size).double(), torch.randn(6).double(), groups), geometry, torch.randn(2, 6).double()

@pytest.mark.parametrize('case', HYBRID, ids=str)
def test_hybrid_values_are_exact(case):
    x, k, geo, _ = hybrid_case(*case)
    assert _thinned(x, k, geo)
    for a, b, c in zip(hybrid_stats(x.requires_grad_(), k, geo), exact_stats(x, k, geo), hybrid_stats(x.detach(), k, geo)): close(a, b, 1e-12); close(c, b, 1e-12)
    with torch.no_grad():
        for a, b in zip(hybrid_stats(x, k, geo), exact_stats(x, k, geo)): assert torch.equal(a, b)

@pytest.mark.parametrize('case', HYBRID, ids=str)
def test_hybrid_gradients_are_exact_on_average(case):
    "Over orders of the images: to the weight each one, to x a fixed set of projections, within standard errors; the bias's is exact"
    x, k, geo, up = hybrid_case(*case)
    want = gradients(exact_stats, x, k, geo, up)[1]
    views, seen = torch.randn(40, x.numel()).double(), []
    for _ in range(200):
        p = torch.randperm(len(x))
        gx, gw, gb = gradients(hybrid_stats, x[p], k, geo, up)[1]
        close(gb, want[2], 1e-9)
        seen.append(torch.cat([views @ gx[p.argsort()].flatten(), gw.flatten()]))
    seen, want = torch.stack(seen), torch.cat([views @ want[0].flatten(), want[1].flatten()])
    noise = seen.std(0)
    assert (noise > 0).all(), 'nothing was left out'
    z = (seen.mean(0) - want)/(noise/len(seen)**.5)
    assert z.abs().max() < 5 and z.square().mean() < 1.6, f'{z.abs().max():.1f} standard errors'

def test_hybrid_gradients_are_exact_where_every_position_is_taken():
    x, k, geo, up = hybrid_case(4, 6, 1, Geometry(1, 1), (3, 3))
    assert not _thinned(x, k, geo)
    for a, b in zip(gradients(hybrid_stats, x, k, geo, up)[1], gradients(exact_stats, x, k, geo, up)[1]): close(a, b, 1e-12)

def test_hybrid_gradients_by_hand():
    "A 1x1 kernel: the gradients are those of a and b over the sampled positions alone, in closed form"
    x, k, geo, (a, b) = hybrid_case(32, 16, 1, Geometry(), (1, 1))
    (mean, var), (gx, gw, _) = gradients(hybrid_stats, x, k, geo, (a, b))
    p = sample_patches(x, (1, 1), geo)[:, :, 0, 0]
    n, y = len(p), p @ k.weight[:, :, 0, 0].T + k.bias
    gy = a/n + 2*b*(y - y.mean(0))/(n - 1)
    close(gw[:, :, 0, 0], gy.T @ p, 1e-10)
    at = gx.permute(0, 2, 3, 1).reshape(-1, 4)
    taken = at.abs().sum(1) > 0
    assert taken.sum() == n and n*16 == len(at)
    close(at.sum(0), (gy @ k.weight[:, :, 0, 0]).sum(0), 1e-10)

@pytest.mark.parametrize('name', ['sampled', 'hybrid'])
@pytest.mark.parametrize('size,geometry', [((3, 1), Geometry(2, (1, 0))), ((1, 3), Geometry(2, (0, 1))), ((1, 1), Geometry(2, 0)), ((2, 3), Geometry(2, 1)), ((3, 3), Geometry(1, 1)), ((3, 3), Geometry(2, 1, 1, 'circular'))])
def test_patches_of_a_larger_kernel_serve_a_smaller_one(name, size, geometry):
    "Statistics and gradients of a branch are the same with and without a 3x3 branch before it"
    torch.manual_seed(0)
    x, k = torch.randn(16, 4, 32, 32).double(), Kernel(torch.randn(6, 4, *size).double(), torch.randn(6).double())
    def after_another(x, kernel, geo):
        m = Moments(x)
        sampled_stats(m, Kernel(torch.randn(2, 4, 3, 3).double()), Geometry(2, 1))
        return STATISTICS[name](m, kernel, geo)
    up = torch.randn(2, 6).double()
    (v1, g1), (v2, g2) = (gradients(f, x, k, geometry, up) for f in (after_another, STATISTICS[name]))
    for a, b in zip((*v1, *g1), (*v2, *g2)): close(a, b, 1e-12)

RANK = """
import sys, torch, torch.distributed as dist
store, out, rank, name = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
dist.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)
from repq.kernels import Geometry, Kernel
from repq.method.sampling import _grid_step, _thinned
from repq.batchnorm import normalize
torch.manual_seed(0)
x, w, bn = torch.randn(64, 4, 8, 8, dtype=torch.float64) + 3, torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True), torch.nn.BatchNorm2d(6).double()
part = x[rank*32:(rank + 1)*32].clone().requires_grad_()
k, mean, var = normalize(Kernel(w), bn, part, Geometry(padding=1), name)
loss = k.conv(part, Geometry(padding=1)).sin().mean()
grads = torch.autograd.grad(loss, (part, w, bn.weight))
for g in grads[1:]: dist.all_reduce(g); g /= 2                      # as data parallel does
torch.save((mean, var, *grads), f'{out}{rank}.pt')
dist.destroy_process_group()
"""

@pytest.mark.parametrize('name', ['exact', 'estimated', 'corrected'])
@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == 'win32', reason='needs torch.distributed with gloo')
def test_two_processes_have_the_statistics_and_gradients_of_one(tmp_path, name):
    run = [subprocess.Popen([sys.executable, '-c', RANK, tmp_path/'store', tmp_path/'r', str(r), name]) for r in range(2)]
    assert [p.wait(120) for p in run] == [0, 0]
    a, b = (torch.load(tmp_path/f'r{r}.pt', weights_only=True) for r in range(2))
    torch.manual_seed(0)
    x, w, bn = torch.randn(64, 4, 8, 8, dtype=torch.float64) + 3, torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True), nn.BatchNorm2d(6).double()
    x.requires_grad_()
    k, mean, var = normalize(Kernel(w), bn, x, Geometry(padding=1), name)
    grads = torch.autograd.grad(k.conv(x, Geometry(padding=1)).sin().mean(), (x, w, bn.weight))
    for got in (a, b):
        for u, v in zip((*got[:2], *got[3:]), (mean, var, *grads[1:])): torch.testing.assert_close(u, v)
    torch.testing.assert_close(torch.cat([a[2], b[2]])/2, grads[0])  # each process' loss is a mean over half of the images

@pytest.mark.parametrize('name', ['sampled', 'hybrid'])
@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == 'win32', reason='needs torch.distributed with gloo')
def test_two_processes_sample_their_own_images(tmp_path, name):
    "Statistics over both, each process's from its own grid, and the gradients that follow"
    run = [subprocess.Popen([sys.executable, '-c', RANK, tmp_path/'store', tmp_path/'r', str(r), name]) for r in range(2)]
    assert [p.wait(120) for p in run] == [0, 0]
    got = [torch.load(tmp_path/f'r{r}.pt', weights_only=True) for r in range(2)]
    torch.manual_seed(0)
    x, w, bn, geo = torch.randn(64, 4, 8, 8, dtype=torch.float64) + 3, torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True), nn.BatchNorm2d(6).double(), Geometry(padding=1)
    x.requires_grad_()
    assert _thinned(x[:32], Kernel(w), geo)
    each = [get_statistics(name)(half, Kernel(w), geo) for half in x.split(32)]
    mean = sum(m for m, _ in each)/2
    var = sum(v + m**2 for m, v in each)/2 - mean**2
    grads = torch.autograd.grad(Kernel(w).affine(*fold(bn, mean, var)).conv(x, geo).sin().mean(), (x, w, bn.weight))
    for one in got:
        for u, v in zip((*one[:2], *one[3:]), (mean, var, *grads[1:])): torch.testing.assert_close(u, v)
    torch.testing.assert_close(torch.cat([got[0][2], got[1][2]])/2, grads[0])
    if name == 'hybrid':
        for u, v in zip(got[0][:2], exact_stats(x, Kernel(w), geo)): torch.testing.assert_close(u, v)

@pytest.mark.parametrize('stats', [exact_stats, sampled_stats, hybrid_stats], ids=['exact', 'sampled', 'hybrid'])
def test_statistics_in_bfloat16_are_close_in_values_and_gradients(stats):
    torch.manual_seed(0)
    x = torch.randn(32, 8, 16, 16).relu().requires_grad_()
    w = (torch.randn(12, 4, 3, 3)/6).requires_grad_()
    def run(dtype):
        with statistics_in(dtype): mean, var = stats(x, Kernel(w, None, 2), Geometry(padding=1))
        return mean, var, *torch.autograd.grad(mean.sin().sum() + var.sqrt().sum(), (x, w))
    want, low = run(None), run(torch.bfloat16)
    for a, b in zip(want, low):
        assert b.dtype == torch.float32 and 0 < (a - b).norm() < .01*a.norm()

def test_statistics_in_bfloat16_keep_outputs_of_half_the_size():
    torch.manual_seed(0)
    layer = RepQLayer(ACBlock(16, 16), None, None).train()
    layer.block.statistics = 'exact'
    x, sizes = torch.randn(8, 16, 20, 20), {}
    for dtype in None, torch.bfloat16:
        with statistics_in(dtype): sizes[dtype] = held_bytes(layer, x, x, lambda out, _: out.sum())
    assert sizes[torch.bfloat16] < .9*sizes[None]

@pytest.mark.parametrize('dtype', [torch.int8, torch.float16, torch.float64, 'bf16'])
def test_statistics_in_other_types_are_refused(dtype):
    "Some would give wrong numbers without a word, some an error from the middle of a forward pass"
    x, k = torch.randn(4, 3, 8, 8), Kernel(torch.randn(5, 3, 3, 3))
    want = exact_stats(x, k)
    with pytest.raises(ValueError, match='bfloat16, or None.*got .*' + str(dtype)):
        with statistics_in(dtype): pass
    for a, b in zip(exact_stats(x, k), want): assert torch.equal(a, b)

def test_statistics_in_ends_with_its_block():
    torch.manual_seed(0)
    x, k = torch.randn(4, 3, 8, 8), Kernel(torch.randn(5, 3, 3, 3))
    want = exact_stats(x, k)
    with pytest.raises(KeyError), statistics_in(torch.bfloat16): raise KeyError
    for a, b in zip(exact_stats(x, k), want): assert torch.equal(a, b)
