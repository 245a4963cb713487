"Costs: the same at every stage, equal to torch's own counter, and without side effects."
import copy, itertools
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from repq.blocks import ACBlock, RepVGGBlock
from repq.export import cost, layer_costs
from repq.layers import RepQLayer
from repq.models import create_model
from repq.quantizers import LSQ
from repq.surgery import deploy, merge, quantize

@settings(max_examples=25, deadline=None)
@given(c=st.sampled_from([2, 4, 6]), out=st.sampled_from([2, 4, 6]), groups=st.sampled_from([1, 2]), k=st.sampled_from([1, 3, 5]), stride=st.integers(1, 2),
       size=st.integers(5, 9), bits=st.integers(2, 9), per_channel=st.booleans(), bn=st.booleans(), block=st.sampled_from([RepVGGBlock, ACBlock]))
def test_every_stage_costs_the_same(c, out, groups, k, stride, size, bits, per_channel, bn, block):
    x = torch.randn(2, c, size, size)
    net = nn.Sequential(block(c, out, k, stride, groups=groups), nn.BatchNorm2d(out) if bn else nn.PReLU(out), nn.Conv2d(out, 3, 1), nn.Flatten(), nn.LazyLinear(5))
    net(x)
    merged, (h, w) = merge(net, verbose=False), net[0].geometry.out_size((size, size), k)
    with FlopCounterMode(display=False) as f, torch.no_grad(): merged.eval()(x[:1])
    assert cost(net, x) == cost(merged, x) and cost(net, x)['macs'] == f.get_total_flops()//2
    q = quantize(net, bits, 8, per_channel=per_channel, first_last_bits=None, adopt=False, verbose=False)
    fresh = cost(q, x)
    assert not any(m.initialized for m in q.modules() if isinstance(m, LSQ))
    q(x)
    assert fresh == cost(q, x) == cost(deploy(q, verbose=False), x)
    n = out*c//groups*k*k
    row = layer_costs(q, x)[0]
    assert (row['parameters'], row['macs'], row['bit_operations']) == (n, n*h*w, n*h*w*bits*8)
    assert row['size_bytes'] == -(-n*bits//8) + 4*out + 4*(out if per_channel or bn else 1) + 4

def test_nothing_is_touched():
    q = quantize(create_model('ac_resnet18_tiny', 10, 1), 4, 4, statistics='sampled', verbose=False).train()
    q(torch.randn(8, 1, 8, 8))
    before, modes, rng = copy.deepcopy(q.state_dict()), [m.training for m in q.modules()], torch.get_rng_state()
    costs = [cost(q, torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))) for n in (1, 3)]
    assert costs[0] == costs[1] and modes == [m.training for m in q.modules()] and torch.equal(rng, torch.get_rng_state())
    for (k, a), b in zip(q.state_dict().items(), before.values()): assert torch.equal(a, b), k
    assert not any(m._forward_hooks for m in q.modules())

def test_bits_set_the_size():
    net = create_model('resnet18_tiny', 10, 1)
    rows = {b: layer_costs(quantize(net, b, b, verbose=False), torch.randn(1, 1, 8, 8)) for b in (2, 4, 8)}
    for a, b, c in itertools.islice(zip(*rows.values()), 1, len(rows[2]) - 1): # first and last stay at 8
        overhead = c['size_bytes'] - c['parameters']
        assert 4*(a['size_bytes'] - overhead) == 2*(b['size_bytes'] - overhead) == c['parameters']
        assert 16*a['bit_operations'] == 4*b['bit_operations'] == c['bit_operations'] == 64*c['macs']

def test_linear_over_positions_and_bad_input():
    layer = RepQLayer(nn.Linear(6, 4), LSQ(3), LSQ(5, False))
    row, = layer_costs(layer, torch.randn(2, 7, 6))
    assert (row['macs'], row['bit_operations'], row['size_bytes']) == (7*24, 7*24*15, 9 + 16 + 8)
    for bad in (torch.randn(0, 6), None, torch.randn(6)):
        with pytest.raises(ValueError, match='batch of one image or more'): cost(layer, bad)
