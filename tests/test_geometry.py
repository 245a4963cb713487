"For any geometry: the branches, the merged kernel, the deployed convolution and the integers are one function."
import copy
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from helpers import BN, KINDS, blocks, cases, close, randomize
from repq.blocks import ACBlock, Block, RepVGGBlock
from repq.kernels import Geometry, Kernel, impulse_response
from repq.layers import RepQLayer
from repq.quantizers import LSQ

@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_eval_branches_equal_deployed(kind, data):
    block, c = data.draw(blocks([kind]))
    block.eval()
    x, conv = c.input(), block.deploy()
    assert type(conv) is nn.Conv2d and not conv.training
    for name in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode'): assert getattr(conv, name) == getattr(block, name), name
    with torch.no_grad():
        want = block(x)
        close(conv(x), want, c.tol, 'deployed')
        close(block.convolve(x, *block.kernel()), want, c.tol, 'kernel')
    assert conv.weight.dtype == c.dtype == want.dtype

@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=30)
@given(data=st.data())
def test_training_branches_equal_merged(kind, data):
    "Outputs, gradients of every parameter and of x, and running statistics"
    block, c = data.draw(blocks([kind]))
    merged = copy.deepcopy(block).train()
    block.train()
    xs = [c.input().requires_grad_() for _ in range(2)]
    a = block(xs[0])
    b = merged.convolve(xs[1], *merged.kernel(xs[1]))
    tol = 1e-8 if c.dtype == torch.float64 else 2e-4 # batch norm over few values divides by small deviations
    close(b, a, tol, 'output')
    g = torch.randn_like(a)
    for y in a, b: (y*g).sum().backward()
    close(xs[1].grad, xs[0].grad, tol*10, 'gradient of x')
    largest = max(p.grad.abs().max().item() for p in block.parameters() if p.grad is not None) # what is before a batch norm may have none but rounding errors
    for (n, p), q in zip(block.named_parameters(), merged.parameters()):
        assert p.grad is not None, n
        close(q.grad, p.grad, tol*10, f'gradient of {n}', largest)
    for (n, p), q in zip(block.named_buffers(), merged.buffers()): close(q, p, tol, n)

@settings(max_examples=40)
@given(blocks())
def test_merge_equals_impulse_response(bc):
    block, c = bc
    want = impulse_response(block, block.in_channels, block.kernel_size, block.stride, block.padding, block.dilation, block.groups, block.padding_mode)
    with torch.no_grad(): k = block.eval().kernel()
    close(k.coarsen(block.groups).weight, want.weight, c.tol*10, 'weight')
    close(torch.zeros_like(want.bias) if k.bias is None else k.bias, want.bias, c.tol*10, 'bias')

@settings(max_examples=40)
@given(blocks(), st.integers(2, 8), st.booleans(), st.sampled_from(['exact', 'estimated', 'corrected', 'sampled', 'hybrid']))
def test_deploy_stores_what_was_trained(bc, bits, per_channel, statistics):
    "Q(M(..)) is integers·step, bit for bit, and so is the deployed layer's output"
    block, c = bc
    layer = RepQLayer(block, LSQ(bits, True, per_channel), LSQ(8, None), statistics).to(c.dtype)
    x = c.input()
    layer.train()(x)
    with torch.no_grad(): layer.weight_quantizer.raw_step.mul_(.7) # not where MinError put it
    layer.eval()
    d = layer.deploy()
    w, b = layer.kernel()
    q = d.block.integers
    assert not q.is_floating_point() and -2**(bits-1) <= int(q.min()) and int(q.max()) < 2**(bits-1)
    step = layer.weight_quantizer.step
    step = step.expand(block.out_channels).view(-1, 1, 1, 1)
    assert torch.equal(q*step, layer.weight_quantizer(w)), 'integers times step is not the fake-quantized weight'
    assert torch.equal(q, (w/step).clamp(-2**(bits-1), 2**(bits-1) - 1).round())
    assert torch.equal(d.block.scale.expand(len(w)), step.flatten())
    with torch.no_grad(): assert torch.equal(d(x), layer(x)), 'outputs differ'
    assert d.stage == 'deployed' and not list(p for p in d.parameters() if p.requires_grad)

@settings(max_examples=20)
@given(cases(), st.booleans())
def test_load_kernel(c, ac):
    "A block that starts from a convolution computes it"
    block = randomize((ACBlock if ac else RepVGGBlock)(*c.args()), c.seed).to(c.dtype).eval()
    torch.manual_seed(c.seed)
    conv = nn.Conv2d(*c.args()[:-1], padding_mode=c.padding_mode).to(c.dtype)
    block.load_kernel(Kernel.of(conv))
    with torch.no_grad(): close(block(c.input()), conv(c.input()), c.tol*10)

@settings(max_examples=30)
@given(cases())
def test_kernel_conv_is_torchs(c):
    "`Kernel.conv` and `Geometry.out_size` agree with nn.Conv2d"
    conv = nn.Conv2d(*c.args()[:-1], padding_mode=c.padding_mode).to(c.dtype)
    y = conv(c.input())
    close(Kernel.of(conv).conv(c.input(), Geometry.of(conv)), y, c.tol)
    assert Geometry.of(conv).out_size(c.size, c.kernel_size) == y.shape[2:]

@settings(max_examples=30)
@given(st.sampled_from([(1, 1), (2, 3), (6, 2), (6, 4), (12, 6)]), st.integers(0, 99))
def test_kernel_algebra(groups, seed):
    "Sum and sequence of kernels with different groups, sizes and biases"
    torch.manual_seed(seed)
    ga, gb = groups
    a = Kernel(torch.randn(12, 12//ga, 3, 1).double(), torch.randn(12).double() if seed % 2 else None, ga)
    b = Kernel(torch.randn(12, 12//gb, 1, 3).double(), torch.randn(12).double() if seed % 3 else None, gb)
    x = torch.randn(2, 12, 5, 6).double()
    close(a.then(b).conv(x), b.conv(a.conv(x)), 1e-10, 'then')
    wide = Geometry(1, 1)
    close((a + b).conv(x, wide), a.conv(x, Geometry(1, (1, 0))) + b.conv(x, Geometry(1, (0, 1))), 1e-10, 'add')
    s, t = torch.randn(2, 12).double()
    close(a.affine(s, t).conv(x), a.conv(x)*s.view(-1, 1, 1) + t.view(-1, 1, 1), 1e-10, 'affine')

def test_borders_are_torchs_where_torch_can_say_it():
    "A branch with padded modules: a bias in the middle is padded as ECB pads it, with itself"
    a, b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, padding=1)
    block = Block([nn.Sequential(a, b)])
    x = torch.randn(2, 2, 6, 7)
    mid = a(x)
    ring = F.pad(mid - a.bias.view(-1, 1, 1), (1, 1, 1, 1)) + a.bias.view(-1, 1, 1)
    close(block(x), F.conv2d(ring, b.weight, b.bias), 1e-5)
    first = nn.Sequential(nn.Conv2d(2, 4, 1, padding=1), nn.Conv2d(4, 3, 3)) # where the first module pads, torch says the same
    close(Block([first])(x), first(x), 1e-5)

def test_statistics_leave_the_border_out():
    "1×1-BN-3×3 with padding 1: the inner batch norm sees the unpadded map, as in the authors' DBB"
    a, bn, b = nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
    block = Block([nn.Sequential(a, bn, b)]).train()
    x = torch.randn(4, 2, 6, 7) + 1
    ref = copy.deepcopy(bn); ref(a(x))
    block(x); close(bn.running_mean, ref.running_mean, 1e-6); close(bn.running_var, ref.running_var, 1e-6)
    block.kernel(x); ref(a(x)); close(bn.running_mean, ref.running_mean, 1e-6); close(bn.running_var, ref.running_var, 1e-6)

def test_frozen_batch_norm_keeps_its_statistics():
    "A batch norm in evaluation mode inside a training block: running statistics, in both forms, and they stay"
    block = randomize(RepVGGBlock(4, 4)).train()
    bn = block.branches['dense'].bn.eval()
    before, x = bn.running_mean.clone(), torch.randn(4, 4, 6, 6)
    twin = copy.deepcopy(block)
    close(twin.convolve(x, *twin.kernel(x)), block(x), 1e-4)
    assert torch.equal(bn.running_mean, before) and torch.equal(twin.branches['dense'].bn.running_mean, before)

@pytest.mark.parametrize('momentum', [None, .3])
def test_momentum(momentum):
    block = RepVGGBlock(4, 4).train()
    for m in block.modules():
        if isinstance(m, BN): m.momentum = momentum
    twin = copy.deepcopy(block)
    for _ in range(3):
        x = torch.randn(4, 4, 6, 6); block(x); twin.kernel(x)
    for (n, p), q in zip(block.named_buffers(), twin.buffers()): close(q, p, 1e-5, n)

def test_batch_norms_without_affine_or_statistics():
    x = torch.randn(4, 4, 6, 6)
    for kw in (dict(affine=False), dict(track_running_stats=False)):
        block = Block([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, **kw)), nn.BatchNorm2d(4, **kw)]).train()
        close(block.convolve(x, *block.kernel(x)), block(x), 1e-4, str(kw))

# Faults found

@pytest.mark.parametrize('kw', [dict(padding=1, count_include_pad=False), dict(padding=0, divisor_override=1)])
def test_pools_that_are_no_convolution_are_refused(kw):
    with pytest.raises(ValueError, match='AvgPool2d'): Block([nn.Sequential(nn.Conv2d(2, 2, 1), nn.AvgPool2d(3, 1, **kw))])

def test_mixed_padding_modes_are_refused():
    with pytest.raises(ValueError, match='padding modes'): Block([nn.Conv2d(2, 2, 3, padding=1, padding_mode='reflect'), nn.Conv2d(2, 2, 3, padding=1)])

def test_block_without_parameters():
    block = Block([nn.BatchNorm2d(4, affine=False)]).eval()
    x = torch.randn(2, 4, 3, 3)
    close(block.deploy()(x), block(x), 1e-5)
