"The table of operations of the integer network and the tables of targets: what is added takes part in everything, what is missing is named."
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from test_saturation import as_version_1, quantized as random_network
from repq.networks import readers as graphs
from repq.export import onnx_session, run_onnx, to_onnx
from repq.graphs import KINDS, Operation, reads, register_kind
from repq.deploy.integer_ops import OPERATIONS, FloatOp, IntegerOp, operation
from repq.integers import check_integers, load_integers, save_integers, to_integer
from repq.deploy.onnx_writer import ONNX, as_floats, as_result, onnx_model
from repq.surgery import calibrate, quantize, quantize_sums
from repq.deploy.targets import Target

@pytest.fixture
def tables():
    "What a test registers is gone after it"
    own = [(t, dict(t)) for t in (graphs._READERS, KINDS, OPERATIONS, ONNX.functions)]
    for f in (F.channel_shuffle, nn.ChannelShuffle, torch.abs, 'abs'): del graphs._READERS[f] # as if nobody had told of them
    yield
    for table, before in own: table.clear(); table.update(before)

def register_mix():
    @reads('channel_shuffle', nn.ChannelShuffle)
    def mix(input, groups): return Operation('mix', [input], dict(groups=groups), keeps=True)
    register_kind('mix', moves=True, floats=all)

def register_abs():
    @reads('abs', 'abs_')
    def absolute(input): return Operation('abs', [input], nonnegative=True)
    register_kind('abs', floats=all)

class Mix(IntegerOp):
    def compute(self, s, x, grids): return F.channel_shuffle(x, s.params['groups'])

class Abs(FloatOp):
    def function(self, s, x): return x.abs()

def write_mix(g, s, x):
    order = np.arange(x.shape[1]).reshape(s.params['groups'], -1).T.flatten()
    return g.op('Gather', x.handle, g.constant(order), axis=1, name=s.name)

def write_abs(g, s, x): return as_result(g, g.op('Abs', as_floats(g, x)), s)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mix, self.b, self.c = nn.Conv2d(4, 8, 3), nn.ChannelShuffle(4), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 3, 1)
    def forward(self, x): return self.c(self.b(self.mix(self.a(F.channel_shuffle(x, 2).abs()).relu())).abs()) # on floats and on integers

def model(x, bits=4, sums=False):
    q = quantize(Net(), bits, bits, verbose=False)
    return calibrate(quantize_sums(q) if sums else q, [x])

@pytest.mark.parametrize('sums', [False, True])
@pytest.mark.parametrize('bits', [8, 4, 2])
def test_an_operation_is_added(tables, bits, sums, tmp_path):
    x = torch.randn(8, 4, 9, 9)
    assert [o.why.split(' of ')[0] for o in check_integers(model(x), x)] == ['nothing is known']*4
    assert [s.op for s in to_integer(model(x), x).steps].count('float') == 4
    register_mix(); register_abs()
    operation('mix')(Mix); operation('abs')(Abs)
    ONNX.writes('mix')(write_mix); ONNX.writes('abs')(write_abs)
    q = model(x, bits, sums)
    net = to_onnx(q, tmp_path/'net.onnx', x)
    assert check_integers(q, x) == [] and sorted(s.op for s in net.steps if s.op in ('mix', 'abs')) == ['abs', 'abs', 'mix', 'mix']
    grids = [s.grid for s in net.steps if s.op == 'abs']
    assert grids[0] is None and grids[1].zero == 0 # on the network's input floats; what is never negative has no sign
    save_integers(net, tmp_path/'net.safetensors')
    for v in torch.randn(8, 4, 9, 9), torch.randn(1, 4, 13, 8):
        assert torch.equal(run_onnx(onnx_session(tmp_path/'net.onnx', exact=False), v), net(v))
        assert torch.equal(load_integers(tmp_path/'net.safetensors')(v), net(v))

def test_a_wrong_operation_is_found(tables):
    x = torch.randn(8, 4, 9, 9)
    register_mix(); register_abs()
    operation('abs')(Abs)
    operation('mix')(type('Wrong', (IntegerOp,), dict(compute=lambda self, s, x, grids: x)))
    with pytest.raises(ValueError, match='integers part from the model here'): to_integer(model(x), x)

def test_what_is_missing_is_named(tables, tmp_path):
    x = torch.randn(8, 4, 9, 9)
    register_mix(); register_abs()
    assert "integers have no operation 'mix'" in [o.why[:33] for o in check_integers(model(x), x) if o.name == 'channel_shuffle'][0]
    operation('mix')(Mix); operation('abs')(Abs)
    net = to_integer(model(x), x)
    with pytest.raises(ValueError, match="'channel_shuffle', an operation 'mix', cannot be written to ONNX"): onnx_model(net, x)
    save_integers(net, tmp_path/'net.safetensors')
    del OPERATIONS['mix']
    with pytest.raises(ValueError, match="integers have no operation 'mix'"): load_integers(tmp_path/'net.safetensors')
    with pytest.raises(ValueError, match="integers have no operation 'mix'"): net(x)

def test_sums_of_version_0_1_0_are_refused_by_targets(tmp_path):
    x = torch.rand(4, 1, 8, 8)
    old = load_integers(as_version_1(to_integer(random_network('ac_resnet18_tiny', 4, x), x), tmp_path/'old.safetensors'))
    with pytest.raises(ValueError, match="an operation 'fused_add', cannot be written to ONNX: a sum of version 0.1.0, .* making the integers anew"): onnx_model(old, x)

def test_kinds_have_operations(): assert set(KINDS) - {'same_border'} <= set(OPERATIONS) # borders have widths in numbers before they are integers

def test_a_target_is_added():
    x, file, target = torch.rand(4, 1, 8, 8), [], Target('lines')
    net = to_integer(random_network('repvgg_a0_tiny', 4, x), x)
    with pytest.raises(ValueError, match="cannot be written to lines"): target.write(net, file, x)
    assert not file
    def line(file, s, *values):
        file.append((s.op, [v.handle for v in values], [v.grid for v in values], [v.shape for v in values]))
        return len(file)
    target.writes(*{s.op for s in net.steps})(line)
    made, values = target.write(net, file, x, 0), net.values(x[:1])
    assert len(file) == len(net.steps) and made[net.output].handle == len(file) and made[net.input].handle == 0
    for s, (op, handles, grids, shapes) in zip(net.steps, file):
        assert op == s.op and handles == [made[i].handle for i in s.inputs] and grids == [net.grids[i] for i in s.inputs] and shapes == [tuple(values[i].shape) for i in s.inputs]
