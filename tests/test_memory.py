"Weights lie in memory as their shape says, and no convolution of ours is one whose weight gradient oneDNN writes past the end of a buffer (oneDNN 6035)."
import itertools
import pytest, torch
from torch.nn import functional as F
from helpers import ALL_BLOCKS
from repq.kernels import Geometry, Kernel, in_order
from repq.layers import RepQLayer
from repq.quantizers import LSQ

def ordered(w): return w.stride() == torch.empty(w.shape).stride()

CHANNELS, SIZES, GROUPS = [(1, 1, 1), (3, 6, 12), (6, 6, 6), (3, 1, 4)], [(1, 1), (3, 3), (1, 3)], [(1, 1), (3, 1), (1, 3), (3, 3), (6, 2), (2, 6)]

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_composed_weights_have_the_strides_of_their_shape(layout):
    tried = 0
    for (i, m, o), ka, kb, (ga, gb) in itertools.product(CHANNELS, SIZES, SIZES, GROUPS):
        if i % ga or m % ga or m % gb or o % gb: continue
        a, b = (Kernel(torch.randn(*s).to(memory_format=layout), None, g) for s, g in (((m, i//ga, *ka), ga), ((o, m//gb, *kb), gb)))
        both = a.then(b)
        res = dict(then=both, affine=a.affine(torch.randn(m)), both=both.affine(torch.randn(o)), sum=both + both, larger=both + Kernel(torch.randn(o, i, 7, 7).to(memory_format=layout)), pad=a.pad((5, 5)))
        if ga > 1: res['coarsen'] = a.coarsen(1)
        for n, k in res.items(): assert ordered(k.weight), f'{n} of {a} and {b}: {tuple(k.weight.shape)}, {k.weight.stride()}'
        for per_channel in True, False: assert ordered(LSQ(4, True, per_channel)(both.affine(torch.randn(o)).weight))
        tried += 1
    assert tried > 100
    odd = torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last)
    assert not ordered(odd.contiguous()) and ordered(in_order(odd)) and torch.equal(in_order(odd), odd)

def overruns(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    "Does the report's condition hold? (16: with AVX-512, 8: with AVX2)"
    return groups == 1 and weight.shape[2:] == (1, 1) and weight.shape[1] < 16 and max(stride if isinstance(stride, tuple) else (stride,)) > 1 and weight.requires_grad

@pytest.fixture
def watched(monkeypatch):
    "Every convolution of the test: whether it would overrun"
    calls, conv2d = [], F.conv2d
    def watching(*args, **kwargs):
        calls.append(torch.is_grad_enabled() and overruns(*args, **kwargs))
        return conv2d(*args, **kwargs)
    monkeypatch.setattr(F, 'conv2d', watching)
    return calls

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('kind', ALL_BLOCKS)
def test_no_convolution_meets_the_overrun(kind, layout, watched):
    for channels, size in itertools.product([(3, 16), (6, 6)], (1, 3)):
        if kind == 'orepa1x1': size = 1
        if kind == 'orepa_large' and size == 1: continue
        try: block = ALL_BLOCKS[kind](*channels, size, 2, size//2, 1, 1, 'zeros')
        except ValueError: continue                                      # a block of another kernel size
        x = torch.randn(4, channels[0], 8, 8).to(memory_format=layout)
        for statistics in ('exact', 'sampled'):
            layer = RepQLayer(block, LSQ(4, True, True), LSQ(8, None), statistics)
            for f in block, layer: f(x).square().mean().backward()
            with torch.no_grad(): layer.eval()(x), layer.deploy()(x)
            assert ordered(layer.quantized_kernel()[0]) and ordered(layer.deploy().block.kernel().weight)
            layer.train()
    assert watched and not any(watched)

def test_the_watch_sees_it(watched):
    w = torch.randn(4, 3, 1, 1, requires_grad=True)
    F.conv2d(torch.randn(1, 3, 4, 4), w, stride=2); Kernel(w).conv(torch.randn(1, 3, 4, 4), Geometry(2)); Kernel(w.detach()).conv(torch.randn(1, 3, 4, 4), Geometry(2))
    assert watched == [True, False, False]
