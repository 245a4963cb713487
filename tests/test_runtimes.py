"One network in every runtime: what is compared, what is missing, and files for ExecuTorch where the package is installed."
import pytest, torch
from torch import nn
from repq.deploy import runtimes
from repq.export import compare_runtimes, executorch_bytes, run_executorch, executorch_method, to_executorch, torch_graph
from repq.bench import inference, table
from repq.networks.waiting import listening
from repq.integers import to_integer
from repq.surgery import calibrate, quantize

class Small(nn.Module):
    "Layers of each kind, and a sum"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head, self.act = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5), nn.PReLU(8)
        self.act.weight.data.uniform_(.1, .4)
    def forward(self, x):
        x = self.a(x).relu()
        x = (x + self.act(self.b(x))).relu()
        return self.head(nn.functional.relu6(self.c(x)).mean((2, 3)))

def small(bits=4):
    torch.manual_seed(0)
    x = torch.rand(32, 1, 10, 10)
    return calibrate(quantize(Small(), bits, bits, verbose=False), [x]).eval(), x

def test_integers_are_the_reference_and_others_are_measured():
    model, x = small()
    rows = {r['form']: r for r in compare_runtimes(model, x[:16], batch=4, rounds=2, only=['ONNX Runtime'])}
    assert rows['integers']['differing'] == rows['integers']['off'] == 0 and rows['integers']['values'] == 80 and rows['integers']['ms'] > 0
    assert rows['float32']['speedup'] is None and rows['integers']['speedup'] > 0
    static = rows['its static quantization']
    assert static['missing'] is None and static['differing'] is None and 0 < static['error'] < 1 and 0 <= static['agreement'] <= 1

def test_what_is_missing_is_a_line(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'openvino', None)
    model, x = small()
    rows = compare_runtimes(model, x[:2], rounds=1, only=['OpenVINO'])
    assert all("pip install 'repq[runtimes]'" in r['missing'] and r['ms'] is None for r in rows) and len(rows) == 4
    assert "repq[runtimes]" in table(rows)
    with pytest.raises(ValueError, match='there is no runtime TensorRT: ONNX Runtime, '): compare_runtimes(model, x[:2], only=['TensorRT'])

def test_a_candidate_is_added_from_outside(monkeypatch):
    monkeypatch.setattr(runtimes, 'CANDIDATES', [])
    @runtimes.candidate('mine', 'the reference', exact=True)
    def mine(case): return case.net
    @runtimes.candidate('mine', 'nothing')
    def nothing(case): raise ValueError('there is no layer for it')
    @runtimes.candidate('mine', 'off by a thousandth', exact=True)
    def bent(case): return lambda x: case.net(x) + .001*case.reference.abs().max()
    model, x, heard = *small(), []
    with listening(lambda what, done, of: heard.append(what)): reference, refused, bent = compare_runtimes(model, x[:4], rounds=1)
    assert reference['differing'] == 0 and refused['missing'] == 'there is no layer for it'
    assert bent['differing'] == 20 and abs(bent['off'] - .001) < 1e-5 and 'mine: nothing' in heard

def test_the_command_says_where_it_was():
    rows = inference('repvgg_a0_tiny', 1, 8, 4, rounds=1, threads=(1,), only=['ONNX Runtime'])
    assert {'model', 'bits', 'batch_size', 'size', 'threads', 'instructions', 'runtime', 'form', 'ms'} <= set(rows[0]) and rows[0]['size'] == 8

@pytest.mark.parametrize('bits', [8, 4, 2])
def test_the_graph_of_torch_means_the_integers(bits):
    "Every value of its own integers, in steps: float arithmetic decides otherwise only next to a border"
    model, x = small(bits)
    net = to_integer(model, x)
    with torch.no_grad(): y = torch_graph(net, x)(x)
    off = (y - net(x)).abs()/net(x).abs().max()
    assert (off > 1e-5).float().mean() < .1 and off.max() < .2
    kinds = [n.target for n in torch_graph(net, x).graph.nodes if n.op == 'call_function']
    assert kinds.count(torch.ops.quantized_decomposed.quantize_per_tensor.default) == sum(s.grid is not None and s.op in ('layer', 'maxpool', 'concat') for s in net.steps)

class Gate(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
    def forward(self, x): return x*self.b(self.a(nn.functional.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()

BETWEEN = dict(swish=nn.SiLU(), gelu=nn.GELU(), hardswish=nn.Hardswish(), gate=Gate(), average=nn.AvgPool2d(3, 2, 1, count_include_pad=False), bilinear=nn.Upsample(scale_factor=2, mode='bilinear'),
    nearest=nn.Upsample(scale_factor=2), ceil=nn.MaxPool2d(3, 2, ceil_mode=True), reflect=nn.ReflectionPad2d(2), constant=nn.ConstantPad2d((1, 0, 2, 1), .3), groups=nn.ChannelShuffle(4),
    part=lambda x: x[:, :, ::2, 1:], roll=lambda x: x.roll((1, -2), (2, 3)), less=lambda x: x - x.flip(2), scaled=lambda x: 1 - x/3 + 2*x, mean=lambda x: x + x.mean(1, keepdim=True).expand(-1, 8, -1, -1),
    largest=lambda x: x*x.amax((2, 3), keepdim=True), turned=lambda x: x.transpose(2, 3), rows=lambda x: x.flatten(2).reshape(x.shape[0], 8, 5, 20), each=nn.BatchNorm2d(8))

class Between(nn.Module):
    def __init__(self, f): super().__init__(); self.a, self.f, self.b = nn.Conv2d(1, 8, 3, padding=1), f, nn.Conv2d(8, 4, 1)
    def forward(self, x): return self.b(self.f(self.a(x)))

def between(f, bits):
    torch.manual_seed(0)
    x = torch.randn(8, 1, 10, 10)
    model = calibrate(quantize(Between(f), bits, bits, verbose=False, adopt=False), [x]).eval()
    return to_integer(model, x), x

@pytest.mark.parametrize('bits', [8, 2])
@pytest.mark.parametrize('f', BETWEEN.values(), ids=BETWEEN)
def test_operations_in_graphs_of_torch(f, bits):
    "torch itself computes the graph: layers may decide otherwise next to a border, what stands between them may not"
    net, x = between(f, bits)
    assert not [s for s in net.steps if s.op in ('float', 'island')]
    with torch.no_grad(): y, plain = torch_graph(net, x)(x), torch_graph(net, x, False)(x)
    off = (y - net(x)).abs()/net(x).abs().max()
    assert y.shape == plain.shape == net(x).shape and (off > 1e-5).float().mean() < .05 and off.max() < .2

@pytest.mark.parametrize('name', ['swish', 'gate', 'average', 'bilinear', 'reflect', 'scaled', 'less'])
def test_executorch_computes_what_stands_between(name, tmp_path):
    pytest.importorskip('executorch')
    net, x = between(BETWEEN[name], 8)
    (tmp_path/'net.pte').write_bytes(executorch_bytes(net, x))
    assert torch.equal(run_executorch(executorch_method(tmp_path/'net.pte'), x), net(x))

def test_executorch_computes_the_reference(tmp_path):
    pytest.importorskip('executorch')
    model, x = small()
    net = to_executorch(model, tmp_path/'net.pte', x)
    assert torch.equal(run_executorch(executorch_method(tmp_path/'net.pte'), x[:8]), net(x[:8]))
    to_executorch(model, tmp_path/'net.pte', x) # over a file of repq's
    (tmp_path/'mine.pte').write_text('mine')
    with pytest.raises(FileExistsError): to_executorch(model, tmp_path/'mine.pte', x)

def test_executorch_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'executorch.exir', None)
    monkeypatch.setitem(__import__('sys').modules, 'executorch.backends.xnnpack.partition.xnnpack_partitioner', None)
    model, x = small()
    with pytest.raises(ImportError, match=r'repq\[executorch\]'): to_executorch(model, tmp_path/'net.pte', x)
    assert not list(tmp_path.iterdir())

def test_a_border_that_its_kernels_lack_is_padded_before():
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8)
    model = calibrate(quantize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), nn.ReLU(), nn.Conv2d(4, 2, 1)), 4, 4, verbose=False), [x])
    net = to_integer(model, x)
    with torch.no_grad(): assert ((torch_graph(net, x)(x) - net(x)).abs() < 1e-6).float().mean() > .95

def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1)
        def forward(self, x, y):
            z = self.a(x).relu() + self.b(y)
            return self.c(z), z.mean((2, 3))
    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8), torch.rand(8, 2, 8, 8)
    model = calibrate(quantize(Two(), 4, 4, verbose=False), [x]).eval()
    net = to_integer(model, x)
    want = net(*x)
    with torch.no_grad(): got = torch_graph(net, x)(*x)
    assert [y.shape for y in got] == [y.shape for y in want]
    pytest.importorskip('executorch')
    to_executorch(model, tmp_path/'net.pte', x)
    for y, w in zip(run_executorch(executorch_method(tmp_path/'net.pte'), x), want, strict=True): assert torch.equal(y, w)
