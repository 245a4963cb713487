"QONNX: whole numbers at their own bits, compared with the package's own execution where it is installed."
import numpy as np, onnx, pytest, torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from hypothesis import given, strategies as st
from torch import nn
from repq.export import ends_of, fewest_bits, qonnx_session, run_qonnx, to_qonnx
from repq.integers import check_integers
from repq.models import create_model
from repq.surgery import calibrate, quantize

@given(st.integers(-300, 300), st.integers(0, 600))
def test_fewest_bits(low, length):
    high = low + length
    if low > 0 or high < 0: low, high = min(low, 0), max(high, 0)
    bits, signed, narrow = fewest_bits(low, high)
    a, b = ends_of(bits, signed, narrow)
    assert a <= low and high <= b and bits >= 1 + signed
    if bits > 1 + signed: # one bit less does not hold it
        a, b = ends_of(bits - 1, signed, False)
        assert low < a or high > b

def int_quant(x, scale, zero, bits, signed, narrow):
    "The operation as its specification has it, in float32"
    low, high = ends_of(int(bits), bool(signed), bool(narrow))
    return ((np.round(np.clip(x/scale + zero, low, high)) - zero)*scale).astype(np.float32)

def execute(model, x):
    "The file computed with `Quant` in NumPy and onnx's own reference of everything else: two implementations beside ONNX Runtime and qonnx"
    class Quant(OpRun):
        op_domain = 'qonnx.custom_op.general'
        def _run(self, x, scale, zero, bits, signed=None, narrow=None, rounding_mode=None): return int_quant(x, scale, zero, bits, signed, narrow),
    run = ReferenceEvaluator(model, new_ops=[Quant])
    return torch.cat([torch.from_numpy(run.run(None, {model.graph.input[0].name: v[None].numpy()})[0]) for v in x])

class Mixed(nn.Module):
    "Everything that a file may hold, in one network"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(12, 8, 3, 2, padding=1, padding_mode='reflect'), nn.Conv2d(8, 8, 1)
        self.act, self.pool, self.head = nn.PReLU(6), nn.AvgPool2d(2), nn.Linear(8, 5)
        self.act.weight.data.uniform_(.1, .4)
    def forward(self, x):
        x = self.act(self.a(x))
        y = nn.functional.relu6(self.b(x)) + x
        y = self.c(torch.cat([nn.functional.silu(y), nn.functional.max_pool2d(x, 3, 1, 1)], 1))
        y = self.d(y)*y.sigmoid()
        return self.head(self.pool(y).mean((2, 3)))

def ready(model, bits, x):
    q = calibrate(quantize(model, bits, bits, verbose=False), [x])
    assert not check_integers(q, x)
    return q

CASES = [('mixed', 8), ('mixed', 4), ('mixed', 2), ('repvgg_a0_tiny', 2), ('ac_resnet18_tiny', 4), ('mobileone_s0_tiny', 4), ('ecbsr_m4c8', 4)]

@pytest.mark.parametrize('name,bits', CASES)
def test_a_file_computes_the_reference(name, bits, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(16, 2 if name == 'mixed' else 1, 8, 8)
    q = ready(Mixed() if name == 'mixed' else create_model(name, in_channels=1, **({} if 'sr' in name else dict(num_classes=10))), bits, x)
    net = to_qonnx(q, tmp_path/'net.qonnx', x)
    model = onnx.load(tmp_path/'net.qonnx')
    assert torch.equal(execute(model, x[:3]), net(x[:3]))
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    weights = {n.input[0].removesuffix('.weight'): int(constants[n.input[3]]) for n in model.graph.node if n.op_type == 'Quant' and n.input[0] in constants}
    assert weights == {s.name: s.params['bits'] for s in net.steps if s.op == 'layer'}
    names = {v.name for v in (*model.graph.value_info, *model.graph.output)}
    assert all(o in names for n in model.graph.node for o in n.output) # shapes of all, which readers need

def test_the_package_agrees(tmp_path):
    pytest.importorskip('qonnx')
    torch.manual_seed(0)
    x = torch.rand(8, 2, 8, 8)
    net = to_qonnx(ready(Mixed(), 4, x), tmp_path/'net.qonnx', x)
    assert torch.equal(run_qonnx(qonnx_session(tmp_path/'net.qonnx'), x[:2]), net(x[:2]))

def test_refusals(tmp_path, monkeypatch):
    class Island(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)
        def forward(self, x): return self.b(torch.cumsum(self.a(x), 2))
    x = torch.rand(4, 1, 8, 8)
    island = calibrate(quantize(Island(), 4, 4, verbose=False), [x])
    with pytest.raises(ValueError, match="'cumsum', an operation 'float', cannot be written to QONNX: .*give it one"): to_qonnx(island, tmp_path/'no.qonnx', x)
    assert not list(tmp_path.iterdir())
    (tmp_path/'mine').write_text('mine')
    q = ready(create_model('repvgg_a0_tiny', 10, 1), 4, x)
    with pytest.raises(FileExistsError): to_qonnx(q, tmp_path/'mine', x)
    assert (tmp_path/'mine').read_text() == 'mine'
    monkeypatch.setitem(__import__('sys').modules, 'qonnx.core.modelwrapper', None)
    with pytest.raises(ImportError, match=r'repq\[qonnx\]'): qonnx_session(tmp_path/'mine')
