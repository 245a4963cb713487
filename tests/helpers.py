"What several test files share: random geometry, random blocks, and comparisons relative to the largest value."
from dataclasses import dataclass
import torch
from hypothesis import HealthCheck, settings, strategies as st
from torch import nn
from repq.blocks import (ACBlock, Block, Conv3XC, DepthwiseFilter, DilatedReparam, DiverseBranchBlock, IdentityConv, LearnableRep, MobileOneBlock, QARepVGGBlock, RepMixer, RepSRBlock,
                         RepVGGBlock, RepVGGDW, Scale, conv_bn)
from repq.ecb import ECB
from repq.kernels import Geometry
from repq.orepa import OREPA, OREPA1x1, OREPALargeKernel

settings.register_profile('repq', deadline=None, derandomize=True, database=None, print_blob=False,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large])
settings.load_profile('repq')

BN = nn.modules.batchnorm._BatchNorm
FULLGRAPH = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 14) # the compiler of torch 2.11 leaves pieces out, that of 2.14 none
MODES = ['zeros', 'reflect', 'replicate', 'circular']

def close(got, want, tol, what='', scale=1.):
    "`got` and `want` differ by less than `tol` times the largest value (or `scale`)"
    assert got.shape == want.shape, f'{what}: {tuple(got.shape)} instead of {tuple(want.shape)}'
    if not want.numel(): return
    scale = max(scale, want.abs().max().item())
    err = (got.double() - want.double()).abs().max().item()
    assert err <= tol*scale, f'{what}: differs by {err:.3g} where the largest value is {scale:.3g}'

def randomize(module, seed=0):
    "No parameter or statistic at its initial value; gamma and the running mean of both signs"
    g = torch.Generator().manual_seed(seed)
    def rand(t, lo, hi): return (torch.rand(t.shape, generator=g, dtype=torch.float64)*(hi - lo) + lo).to(t)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, BN):
                if m.weight is not None:
                    m.weight.copy_(rand(m.weight, .5, 1.5)*rand(m.weight, -1, 1).sign())
                    m.bias.copy_(rand(m.bias, -1, 1))
                if m.running_mean is not None: m.running_mean.copy_(rand(m.running_mean, -1, 1)); m.running_var.copy_(rand(m.running_var, .5, 2))
            elif isinstance(m, (Scale, IdentityConv, DepthwiseFilter)):
                for p in m.parameters(): p.copy_(rand(p, -1, 1))
            elif getattr(m, 'bias', None) is not None and isinstance(m, (nn.Conv2d, nn.Linear)): m.bias.copy_(rand(m.bias, -1, 1))
    return module

@dataclass
class Case:
    "A geometry with channels and a fitting input"
    ins: int; outs: int; kernel_size: tuple; stride: tuple; padding: tuple; dilation: tuple; groups: int; padding_mode: str
    size: tuple; batch: int; dtype: torch.dtype; seed: int

    @property
    def geometry(self): return Geometry(self.stride, self.padding, self.dilation, self.padding_mode)
    def args(self): return (self.ins, self.outs, self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
    def input(self, shift=.3):
        g = torch.Generator().manual_seed(self.seed)
        return (torch.randn(self.batch, self.ins, *self.size, generator=g, dtype=torch.float64) + shift).to(self.dtype)
    @property
    def tol(self): return 1e-10 if self.dtype == torch.float64 else 1e-5

@st.composite
def cases(draw, square=False, dilations=(1, 2), dtypes=(torch.float32, torch.float64)):
    depthwise = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 3]))
    ins, outs = groups*draw(st.integers(1, 2)), groups*draw(st.integers(1, 2))
    if depthwise: groups, outs = ins, ins*draw(st.sampled_from([1, 2]))
    if draw(st.booleans()): outs = ins
    k = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (3, 5), (5, 1), (1, 3)]))
    if square: k = (k[0], k[0])
    pairs = lambda s: st.one_of(s.map(lambda v: (v, v)), st.tuples(s, s))
    stride, dilation = draw(pairs(st.integers(1, 3))), draw(pairs(st.sampled_from(dilations)))
    if draw(st.booleans()): stride = (1, 1)
    padding = tuple(draw(st.one_of(st.just(d*(n//2)), st.integers(0, d*(n//2) + 2))) for n, d in zip(k, dilation)) # also < and > half the kernel
    mode = draw(st.sampled_from(MODES))
    # room for three outputs or more in each direction, and for reflections
    size = tuple(max(d*(n-1) + 1 + 2*s - 2*p, 2*p + 1, 3) + draw(st.integers(0, 3)) for n, d, s, p in zip(k, dilation, stride, padding))
    return Case(ins, outs, k, stride, padding, dilation, groups, mode, size, draw(st.integers(2, 4)), draw(st.sampled_from(dtypes)), draw(st.integers(0, 999)))

# Blocks composed of public pieces, each a function of a Case. Modules have no padding: the block pads once.

def _conv(c, ins, outs, k, groups=None, stride=1, bias=False):
    return nn.Conv2d(ins, outs, k, stride, 0, c.dilation, c.groups if groups is None else groups, bias=bias)

def _block(branches, c): return Block(branches, c.padding, c.padding_mode)

def bottleneck(c):
    "1×1-BN-k×k-BN beside a plain 1×1-BN"
    mid = c.ins*2
    deep = nn.Sequential(_conv(c, c.ins, mid, 1), nn.BatchNorm2d(mid), _conv(c, mid, c.outs, c.kernel_size, stride=c.stride), nn.BatchNorm2d(c.outs))
    return _block(dict(deep=deep, point=conv_bn(c.ins, c.outs, 1, c.stride, groups=c.groups)), c)

def pooled(c):
    "1×1-BN-AvgPool-BN beside a k×k convolution with bias; a pool has no dilation"
    pool = nn.Sequential(_conv(c, c.ins, c.outs, 1), nn.BatchNorm2d(c.outs), nn.AvgPool2d(c.kernel_size, c.stride), nn.BatchNorm2d(c.outs))
    return _block(dict(pool=pool, dense=nn.Conv2d(c.ins, c.outs, c.kernel_size, c.stride, groups=c.groups)), c)

def biased(c):
    "Convolutions with biases: one without batch norm, one sequence with a bias in its middle"
    deep = nn.Sequential(_conv(c, c.ins, c.outs, 1, bias=True), _conv(c, c.outs, c.outs, c.kernel_size, stride=c.stride, bias=True), nn.BatchNorm2d(c.outs))
    return _block([_conv(c, c.ins, c.outs, c.kernel_size, stride=c.stride, bias=True), deep], c)

def norm_over_sum(c):
    "A block as the first operation of a branch, with a batch norm over its sum (as QARepVGG's)"
    inner = {'dense': nn.Sequential(_conv(c, c.ins, c.outs, c.kernel_size, stride=c.stride), nn.BatchNorm2d(c.outs)), 'point': nn.Conv2d(c.ins, c.outs, 1, c.stride, groups=c.groups)}
    if c.ins == c.outs and c.stride == (1, 1): inner['identity'] = nn.Identity()
    return _block([nn.Sequential(Block(inner, padding=0), nn.BatchNorm2d(c.outs))], c)

def nested_middle(c):
    "BN-1×1-BN-(k×k + 1×1-BN)-BN: a batch norm before everything, and a block in the middle"
    inner = Block([_conv(c, c.outs, c.outs, c.kernel_size, stride=c.stride), conv_bn(c.outs, c.outs, 1, c.stride, groups=c.groups)], padding=0)
    deep = nn.Sequential(nn.BatchNorm2d(c.ins), _conv(c, c.ins, c.outs, 1, groups=1, bias=True), nn.BatchNorm2d(c.outs), inner, nn.BatchNorm2d(c.outs))
    return _block(dict(deep=deep), c)

def identity(c): return _block([nn.Sequential(nn.BatchNorm2d(c.ins), nn.Identity()), nn.Sequential(nn.Identity())], c)

PUBLISHED = dict(repvgg=RepVGGBlock, acnet=ACBlock, dbb=DiverseBranchBlock, mobileone=lambda *a: MobileOneBlock(*a, num_conv_branches=2), qarepvgg=QARepVGGBlock, repsr=RepSRBlock, orepa=OREPA, ecb=ECB,
                 repmixer=RepMixer, repvggdw=RepVGGDW, dilated=DilatedReparam, conv3xc=Conv3XC, learnable=lambda *a: LearnableRep(*a, num_conv_branches=2))
ALL_BLOCKS = {**PUBLISHED, 'orepa1x1': lambda i, o, k, *a: OREPA1x1(i, o, 1, *a), 'orepa_large': lambda i, o, k, *a: OREPALargeKernel(i, o, 5, *a)} # these two at their own kernel size

def published(cls): return lambda c: cls(*c.args())
def plain(c): return _block([_conv(c, c.ins, c.outs, c.kernel_size, stride=c.stride, bias=True)], c)

KINDS = dict({n: published(cls) for n, cls in PUBLISHED.items()}, plain=plain, bottleneck=bottleneck, pooled=pooled, biased=biased, norm_over_sum=norm_over_sum, nested_middle=nested_middle, identity=identity)

@st.composite
def blocks(draw, kinds=tuple(KINDS), **kw):
    "(block, case): nothing at its initial value"
    kind = draw(st.sampled_from(list(kinds)))
    c = draw(cases(dilations=(1,) if kind == 'pooled' else (1, 2), **kw))
    if kind == 'identity': c.outs, c.kernel_size, c.stride, c.groups = c.ins, (1, 1), (1, 1), c.ins
    torch.manual_seed(c.seed)
    return randomize(KINDS[kind](c).to(c.dtype), c.seed), c

def with_steps(q, x):
    "`q` with steps from what evaluation computes for `x`; nothing else of it changes"
    from repq.quantizers import LSQ
    modes = {m: m.training for m in q.modules()}
    for m in modes: m.training = isinstance(m, LSQ)
    with torch.no_grad(): q(x)
    for m, t in modes.items(): m.training = t
    return q

def states(module): return {k: v.clone() for k, v in module.state_dict().items()}

def same_state(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), f'{k} differs'

# a run of a second, and how it is asked for

def ignore(done, of, values): pass
KW = dict(on_epoch=ignore, timing=0)
TINY = dict(model='repvgg_a0_tiny', method='repq-bn', epochs=1, batch_size=240)

def cut(done, of, values):
    "`on_epoch` of a run that is cut off"
    if done >= 1: raise RuntimeError('cut')
