"Every block in every stage, with every kind of statistics; and against formulas written down independently."
import copy, math
from functools import partial
import pytest, torch
from torch import nn
from torch.nn import functional as F
from helpers import ALL_BLOCKS, BN, PUBLISHED, close, randomize, states
from repq.blocks import Block, DiverseBranchBlock, MobileOneBlock, QARepVGGBlock, RepSRBlock, RepVGGBlock, conv_bn
from repq.checkpoints import to_official
from repq.ecb import ECB
from repq.kernels import Kernel
from repq.layers import RepQLayer
from repq.orepa import OREPA, OREPA1x1, OREPALargeKernel
from repq.surgery import adapt_statistics, calibrate, deploy, merge, param_groups, quantize, reparametrize, train_merged

quiet = dict(verbose=False)

class Blur(nn.Module):
    "An operation of a user's own: a learned blend of the pixel and its neighbours"
    def __init__(self, c): super().__init__(); self.a = nn.Parameter(torch.full((c,), .3))
    def kernel(self): c = len(self.a); return Kernel.average(c, 3, dtype=self.a.dtype).affine(self.a) + Kernel.identity(c, dtype=self.a.dtype).affine(1 - self.a)

def users_own(i, o, k, stride=1, padding=None, dilation=1, groups=1, padding_mode='zeros'):
    "A composition of a user's own, with a batch norm in its middle and a block inside a branch"
    inner = Block([nn.Conv2d(o, o, 1, groups=groups), nn.BatchNorm2d(o)])
    deep = nn.Sequential(nn.Conv2d(i, o, 1, groups=groups, bias=False), nn.BatchNorm2d(o), Blur(o), nn.Conv2d(o, o, 1, stride, groups=groups), inner)
    return Block(dict(deep=deep, dense=conv_bn(i, o, 3, stride, groups=groups)), padding=1, padding_mode=padding_mode)

BLOCKS = {**ALL_BLOCKS, 'users_own': users_own}

def net(block):
    "Two blocks, one strided and one grouped, each with a batch norm behind it where it has none inside"
    def unit(*args):
        b = block(*args)
        return [b, *([] if any(isinstance(m, BN) for m in b.modules()) else [nn.BatchNorm2d(b.out_channels)]), nn.ReLU()]
    return randomize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *unit(8, 8, 3, 2, None, 1, 2), *unit(8, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))).double()

def stage_of(model, stage, statistics):
    if stage == 'branched': return model
    return train_merged(model, statistics, **quiet) if stage == 'merged' else quantize(model, 4, 4, statistics, **quiet)

def inputs_of(model, x):
    "The integers that each quantized layer of `model` sees"
    seen, hooks = {}, []
    for n, m in model.named_modules():
        if isinstance(m, RepQLayer) and m.input_quantizer is not None: hooks.append(m.register_forward_pre_hook(lambda m, a, n=n: seen.update({n: m.input_quantizer.quantized(a[0])})))
    with torch.no_grad(): y = model(x)
    for h in hooks: h.remove()
    return seen, y

@pytest.mark.parametrize('stage,statistics', [('branched', None)] + [(s, n) for s in ('merged', 'quantized') for n in ('exact', 'estimated', 'corrected', 'sampled', 'hybrid')])
@pytest.mark.parametrize('name', BLOCKS)
def test_trains_deploys_and_survives_saving(name, stage, statistics, tmp_path):
    x, y = torch.randn(16, 3, 12, 12).double(), torch.randint(5, (16,))
    source = net(BLOCKS[name])
    model = calibrate(stage_of(source, stage, statistics), x.split(8)).train()
    opt = torch.optim.SGD(param_groups(model, 1e-4), .01, momentum=.9)
    F.cross_entropy(model(x), y).backward()
    for n, p in model.named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), n
    before = states(model)
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters()) and any(not torch.equal(before[n], p) for n, p in model.named_parameters())

    model.eval()
    integers = deploy(model, **quiet)
    (seen, out), (deployed_seen, deployed_out) = inputs_of(model, x), inputs_of(integers, x)
    assert seen.keys() == deployed_seen.keys() and (len(seen) == 4) == (stage == 'quantized')
    for n in seen: assert torch.equal(seen[n], deployed_seen[n]), f'{n}: another integer comes in'
    for n, m in model.named_modules():
        if isinstance(m, RepQLayer) and stage == 'quantized': assert torch.equal(m.weight_quantizer.quantized(m.kernel().weight), integers.get_submodule(n).block.integers), n
    close(deployed_out, out, 1e-9, 'deployed')

    torch.save(model.state_dict(), tmp_path/'m.pt')
    fresh = stage_of(net(BLOCKS[name]), stage, statistics)
    fresh.load_state_dict(torch.load(tmp_path/'m.pt', weights_only=True))
    with torch.no_grad(): assert torch.equal(fresh.eval()(x), out)

# Any module

def conv_net(k, bn, stride=1, padding=0, dilation=1, groups=1, padding_mode='zeros', outs=8):
    conv = nn.Conv2d(8, outs, k, stride, padding, dilation, groups, bias=not bn, padding_mode=padding_mode)
    return randomize(nn.Sequential(conv, *([nn.BatchNorm2d(outs)] if bn else []), nn.ReLU(), nn.Conv2d(outs, 4, 1))).double()

CONVS = {'strided': dict(k=3, stride=2, padding=1), 'grouped': dict(k=3, padding=1, groups=4), 'depthwise': dict(k=3, padding=1, groups=8), 'depthwise, more outputs': dict(k=3, padding=1, groups=8, outs=16), 'dilated': dict(k=3, padding=2, dilation=2),
         '1×1': dict(k=1), '1×1 strided': dict(k=1, stride=2, outs=12), '5×5': dict(k=5, padding=2), '7×7': dict(k=7, padding=3, stride=2), 'no padding': dict(k=3), 'oblong': dict(k=(3, 5), padding=(1, 2), stride=(2, 1)), 'reflected': dict(k=5, padding=2, padding_mode='reflect')}

@pytest.mark.parametrize('what', CONVS)
@pytest.mark.parametrize('name', PUBLISHED)
def test_reparametrize_any_convolution(name, what):
    x = torch.randn(8, 8, 13, 14).double()
    for bn in True, False:
        model = conv_net(bn=bn, **CONVS[what]).eval()
        if bn:
            model[1].reset_running_stats(); model[1].momentum = None # a batch norm that has seen its data
            model.train()(x); model.eval()
        new = reparametrize(model, PUBLISHED[name], **quiet)
        assert isinstance(new[0], Block)
        with torch.no_grad():
            want = model(x)
            close(new(x), want, 1e-9, f'evaluation, bn={bn}')
            close(merge(new, **quiet)(x), want, 1e-9, 'merged')
            close(deploy(new, **quiet)(x), want, 1e-9, 'deployed')
            close(adapt_statistics(copy.deepcopy(new), [x]).train()(x), want, .1, 'training mode, adapted')
        paper = reparametrize(model, PUBLISHED[name], init='paper', **quiet).train()
        q = quantize(paper, 4, 4, 'estimated', **quiet)
        q(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())

@pytest.mark.parametrize('k', [3, 5, 7])
def test_reparametrize_with_a_chain(k):
    "A chain of 3×3 kernels cannot hold any k×k; the rest gets a branch"
    for groups in 1, 4:
        conv, x = nn.Conv2d(8, 8, k, padding=k//2, groups=groups), torch.randn(2, 8, 9, 9)
        new = reparametrize(nn.Sequential(conv), OREPALargeKernel, **quiet)
        assert ('rest' in new[0].branches) == (k > 3)
        with torch.no_grad(): close(new(x), conv(x), 1e-5)

def test_blocks_by_partial(capsys):
    reparametrize(nn.Sequential(nn.Conv2d(4, 4, 3)), partial(MobileOneBlock, num_conv_branches=3))
    assert '1 convolution → MobileOneBlock' in capsys.readouterr().out

def test_what_cannot_be_replaced_is_named(capsys):
    model = reparametrize(nn.Sequential(nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 3)), OREPALargeKernel)
    out = capsys.readouterr().out
    assert '1 convolution' in out and 'OREPALargeKernel' in out and 'kernel_size=(2, 2)' in out and type(model[0]) is nn.Conv2d

def test_orepa_batch_norm_is_absorbed_with_integers_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), OREPA(8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    q = quantize(model, 4, 4, **quiet).train()
    for _ in range(3): q(torch.randn(8, 3, 9, 9))
    nn.init.uniform_(q[3].weight, -1.5, 1.5) # negative factors as well
    d = deploy(q.eval(), **quiet)
    assert isinstance(d[3], nn.Identity) and torch.equal(d[2].block.integers, q[2].weight_quantizer.quantized(q[2].kernel().weight))
    assert (d[2].block.scale < 0).any()

# Formulas written down independently of the recursion

@pytest.mark.parametrize('groups', [1, 2, 4, 8])
@pytest.mark.parametrize('k', [3, 5])
def test_orepa_formula(groups, k):
    "`Σ vⱼ·Wⱼ` from official names, the rows of the pointwise weight in turns over groups; prior with 3 for k"
    i = o = 8
    block = randomize(OREPA(i, o, k, groups=groups))
    s = {n.removeprefix('weight_orepa_'): v for n, v in to_official(block).items()}
    v, ig, og = s['vector'], i//groups, o//groups
    centre = F.pad(s['1x1'], [k//2]*4)
    first, second = s['1x1_kxk_idconv1'] + s['id_tensor'], s['1x1_kxk_conv2']
    t, (dw, pw) = first.shape[0]//groups, (s['gconv_dw'], s['gconv_pw'])
    assert first.shape[0] == (i if groups <= 4 else 2*i)
    deep, separable = torch.zeros(2, o, ig, k, k)
    for out in range(o):
        c, q = divmod(out, og)
        for a in range(ig):
            for m in range(t): deep[out, a] += first[c*t + m, a, 0, 0]*second[out, m]
            for m in range(8): separable[out, a] += dw[(c*ig + a)*8 + m, 0]*pw[q*groups + c, a*8 + m, 0, 0]
    prior = torch.tensor([[[math.cos(math.pi*(h + .5)*(n + 1)/k) if n < o/2 else math.cos(math.pi*(w + .5)*(n + 1 - o/2)/k) for w in range(k)] for h in range(k)] for n in range(o)])
    close(s['prior'], prior, 1e-6)
    parts = [s['origin'], s['avg_conv']/k**2, s['pfir_conv']*prior[:, None], deep, centre, separable]
    close(block.kernel().weight, sum(f.view(-1, 1, 1, 1)*p for f, p in zip(v, parts)), 1e-5)

def test_orepa_start():
    block = OREPA(16, 16, groups=8)
    s = to_official(block)
    assert s['vector'].mean(1).tolist() == [.25, .25, 0, .5, 1, .5] and not s['weight_orepa_1x1_kxk_idconv1'].any()
    for n in 'origin', 'avg_conv', '1x1', '1x1_kxk_conv2', 'gconv_dw', 'gconv_pw':
        w = s[f'weight_orepa_{n}']
        bound = (6/w[0].numel())**.5 # Kaiming's, for slope 0
        assert .8*bound < w.abs().max() <= bound, n
    one = OREPA1x1(8, 16)
    assert torch.equal(one.branches.product[0].weight[:, :, 0, 0], torch.eye(8)) and torch.equal(OREPA1x1(16, 8).branches.product[1].weight[:, :, 0, 0], torch.eye(8))

@pytest.mark.parametrize('k', [5, 7])
def test_large_kernel_is_composed_without_flipping(k):
    block = randomize(OREPALargeKernel(3, 8, k))
    blocks = [block.branches.chain[0], *(m.op for m in block.branches.chain[1:])]
    w = blocks[0].kernel().weight.transpose(0, 1)
    for b in blocks[1:]: w = F.conv2d(w, b.kernel().weight, padding=2)
    close(block.kernel().weight, w.transpose(0, 1), 1e-5)

@pytest.mark.parametrize('kw', [dict(), dict(stride=2), dict(groups=4), dict(groups=8), dict(kernel_size=5), dict(kernel_size=5, groups=8, stride=2), dict(kernel_size=1)])
def test_dbb_formula(kw):
    "Evaluation by plain torch calls on the official names, the border filled with the batch norm's image of zero"
    block = randomize(DiverseBranchBlock(8, 8, **kw)).eval()
    s, k, stride, g = to_official(block), block.kernel_size[0], block.stride[0], block.groups
    x, p = torch.randn(2, 8, 11, 12), k//2
    def bn(x, n): return F.batch_norm(x, s[f'{n}.running_mean'], s[f'{n}.running_var'], s[f'{n}.weight'], s[f'{n}.bias'])
    def bordered(x, n):
        y = bn(torch.zeros(1, x.shape[1], 1, 1), n).expand(len(x), -1, x.shape[2] + 2*p, x.shape[3] + 2*p).clone()
        y[:, :, p:p + x.shape[2], p:p + x.shape[3]] = bn(x, n)
        return y
    want = bn(F.conv2d(x, s['dbb_origin.conv.weight'], None, stride, p, 1, g), 'dbb_origin.bn')
    if g == 8:
        assert not any(n.startswith('dbb_1x1.') for n in s) and s['dbb_1x1_kxk.conv1.weight'].shape[0] == 16
        want = want + bn(F.avg_pool2d(x, k, stride, p), 'dbb_avg.avgbn')
        mid = F.conv2d(x, s['dbb_1x1_kxk.conv1.weight'], groups=g)
    else:
        want = want + bn(F.conv2d(x, s['dbb_1x1.conv.weight'], None, stride, 0, 1, g), 'dbb_1x1.bn')
        want = want + bn(F.avg_pool2d(bordered(F.conv2d(x, s['dbb_avg.conv.weight'], groups=g), 'dbb_avg.bn.bn'), k, stride), 'dbb_avg.avgbn')
        w = s['dbb_1x1_kxk.idconv1.weight'].clone()
        for c in range(8): w[c, c % (8//g)] += 1
        mid = F.conv2d(x, w, groups=g)
    want = want + bn(F.conv2d(bordered(mid, 'dbb_1x1_kxk.bn1.bn'), s['dbb_1x1_kxk.conv2.weight'], None, stride, 0, 1, g), 'dbb_1x1_kxk.bn2')
    close(block(x), want, 1e-5); close(block.deploy()(x), want, 1e-5)

@pytest.mark.parametrize('kw', [dict(), dict(stride=2), dict(groups=4)])
def test_repsr_and_qarepvgg_formula(kw):
    x = torch.randn(2, 8, 9, 9)
    b = randomize(RepSRBlock(8, 8, **kw)).train()
    branch = lambda s: s[2](s[1](F.conv2d(x, s[0].weight, s[0].bias, b.stride, 1, 1, b.groups)))
    close(b(x), branch(copy.deepcopy(b.branches.branch1)) + branch(copy.deepcopy(b.branches.branch2)) + (x if b.stride == (1, 1) else 0), 1e-5)
    q = randomize(QARepVGGBlock(8, 8, **kw)).train()
    inner, bn = copy.deepcopy(q.branches.post.sum.branches), copy.deepcopy(q.branches.post.bn)
    dense = inner.dense.bn(F.conv2d(x, inner.dense.conv.weight, None, q.stride, 1, 1, q.groups))
    close(q(x), bn(dense + inner.point(x) + (x if q.stride == (1, 1) else 0)), 1e-5)

def test_ecb_start():
    block = ECB(64, 64)
    for kind in 'sobel_x', 'sobel_y', 'laplacian':
        edge = block.branches[kind][1]
        assert 5e-4 < edge.scale.std() < 2e-3 and 5e-4 < edge.bias.std() < 2e-3
    assert block.branches.expand[0].out_channels == 128

def test_padding_smaller_than_half_crops_thin_branches():
    "ACNet's rule, and the same for 1×1 and identity: with padding 0 a point in the corner is the centre of the first kernel"
    x = torch.randn(2, 4, 7, 8)
    block = randomize(RepVGGBlock(4, 4, padding=0)).eval()
    b = block.branches
    close(block(x), b.dense(x) + b.point(x[..., 1:-1, 1:-1]) + b.identity(x[..., 1:-1, 1:-1]), 1e-5)
