"The fast paths equal the slow ones, and the benchmarks measure what they say"
import copy, json, pickle
from itertools import product
import pytest, torch, torch.nn as nn
from hypothesis import given, settings, strategies as st
from repq.kernels import Geometry, Kernel
from repq.batchnorm import STATISTICS, fold, get_statistics, normalize, recompute_exact
from repq.bench import held_bytes, lsq_autograd, official, peers, train_step
from repq.blocks import ACBlock, RepVGGBlock
from repq.layers import RepQLayer
from repq.orepa import OREPA
from repq.quantizers import LSQ, fake_quantize
from repq.cli import app
from typer.testing import CliRunner
from helpers import FULLGRAPH

def close(a, b, tol=1e-9):
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=tol, atol=tol)

sizes = st.sampled_from([1, 3, 5])

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), sizes, sizes), min_size=1, max_size=4), st.integers(0, 99))
def test_a_sum_of_kernels_is_the_sum_of_dense_padded_ones(branches, seed):
    torch.manual_seed(seed)
    kernels = [Kernel(torch.randn(8, 4//g, h, w, dtype=torch.float64, requires_grad=True), groups=g) for g, h, w in branches]
    size = max(k.kernel_size[0] for k in kernels), max(k.kernel_size[1] for k in kernels)
    def dense(k):
        p, q = (size[0] - k.kernel_size[0])//2, (size[1] - k.kernel_size[1])//2
        rows = [nn.functional.pad(w, (q, q, p, p, (g*4)//k.groups, 4 - (g + 1)*4//k.groups)) for g, w in enumerate(k.weight.chunk(k.groups))]
        return torch.cat(rows)
    total = Kernel.total(kernels)
    got, want = total.coarsen(1).weight, sum(dense(k) for k in kernels)
    seed = torch.randn_like(want)
    weights = [k.weight for k in kernels]
    close([got, *torch.autograd.grad(got, weights, seed)], [want, *torch.autograd.grad(want, weights, seed)])

@pytest.mark.parametrize('statistics', STATISTICS)
@pytest.mark.parametrize('groups,bias,stride', product((1, 2), (False, True), (1, 2)))
def test_normalize_is_statistics_then_fold_then_affine(statistics, groups, bias, stride):
    torch.manual_seed(0)
    x = torch.randn(40, 4, 9, 7, dtype=torch.float64, requires_grad=True)
    k = Kernel(torch.randn(6, 4//groups, 3, 3, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64, requires_grad=True) if bias else None, groups)
    bn, geo = nn.BatchNorm2d(6).double(), Geometry(stride, 1)
    nn.init.normal_(bn.weight)
    short, *seen = normalize(k, bn, x, geo, statistics)
    stats = get_statistics(statistics)(x, k, geo)
    long = k.affine(*fold(bn, *stats))
    inputs = [x, k.weight, bn.weight, bn.bias] + [k.bias]*bias
    grads = [torch.autograd.grad((o.weight.sin().sum() + o.bias.cos().sum()), inputs) for o in (short, long)]
    close([*short, *seen, *grads[0]], [*long, *(s.detach() for s in stats), *grads[1]])

@pytest.mark.parametrize('block', [ACBlock, RepVGGBlock])
@pytest.mark.parametrize('groups,stride', product((1, 2), (1, 2)))
def test_outputs_computed_again_give_what_kept_ones_do(block, groups, stride):
    torch.manual_seed(0)
    m = RepQLayer(block(8, 8, stride=stride, groups=groups), LSQ(4, True, per_channel=True, channels=8), LSQ(4, False)).double()
    x = torch.randn(6, 8, 9, 9, dtype=torch.float64).relu().requires_grad_()
    m(x)
    def run(on):
        twin = copy.deepcopy(m)
        with recompute_exact(on): out = twin(x)
        grads = torch.autograd.grad(out.sin().sum(), (x, *twin.parameters()))
        return [out, *grads, *twin.buffers()]
    close(run(True), run(False), 1e-12)
    sizes = {}
    for on in False, True:
        with recompute_exact(on): sizes[on] = held_bytes(m, x, x, lambda out, _: out.sum())
    assert sizes[True] < sizes[False]

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.floats(.01, 2), st.integers(0, 99))
def test_fake_quantize_has_the_gradients_of_its_formula(bits, signed, step, seed):
    torch.manual_seed(seed)
    qn, qp = (-2**(bits - 1), 2**(bits - 1) - 1) if signed else (0, 2**bits - 1)
    v, s, g = torch.randn(64, dtype=torch.float64, requires_grad=True), torch.tensor(step, dtype=torch.float64, requires_grad=True), torch.randn(64, dtype=torch.float64)
    close(*((f(v, s, qn, qp), *torch.autograd.grad(f(v, s, qn, qp), (v, s), g)) for f in (fake_quantize, lsq_autograd)))

def test_the_ends_of_the_grid_belong_to_it():
    v = torch.tensor([-8*.25, 7*.25, -8.001*.25, 7.001*.25], requires_grad=True)
    fake_quantize(v, torch.tensor(.25), -8, 7).sum().backward()
    assert v.grad.tolist() == [1, 1, 0, 0]

def layer(block=None, **kw): return RepQLayer(block or ACBlock(8, 8), LSQ(4, True, per_channel=True, channels=8), LSQ(4, False), **kw)

@pytest.mark.parametrize('make', [lambda: layer(statistics='estimated'), lambda: layer(statistics='corrected'), lambda: layer(RepVGGBlock(8, 8)), lambda: layer(OREPA(8, 8))])
def test_a_layer_compiles_into_one_graph(make):
    torch.manual_seed(0)
    m, x = make(), torch.randn(8, 8, 6, 6).relu()
    m(x)
    graphs = []
    def backend(gm, _): graphs.append(gm); return gm.forward
    torch._dynamo.reset()
    twin = torch.compile(m, fullgraph=FULLGRAPH, backend=backend)
    state = {k: v.clone() for k, v in m.state_dict().items()}
    got = twin(x); m.load_state_dict(state); want = m(x)
    assert len(graphs) == 1
    torch.testing.assert_close(got, want)

@torch.no_grad()
@pytest.mark.parametrize('change', ['step', 'data', 'load', 'half-precision copy', 'quantizer', 'running mean'])
def test_a_kept_kernel_follows_every_change(change):
    torch.manual_seed(0)
    m, x = layer(), torch.randn(8, 8, 6, 6).relu()
    m(x); m.eval()
    before, conv = m(x), next(o for o in m.modules() if isinstance(o, nn.Conv2d))
    if change == 'step': conv.weight.add_(1)
    elif change == 'data': conv.weight.data.mul_(2)
    elif change == 'load': m.load_state_dict({k: v*2 if v.is_floating_point() and not k.endswith(('init_step', 'qrange')) else v for k, v in m.state_dict().items()})
    elif change == 'half-precision copy': conv.weight = nn.Parameter(conv.weight.half().float()*1.5)
    elif change == 'quantizer': m.weight_quantizer = None
    else: next(o for o in m.modules() if isinstance(o, nn.BatchNorm2d)).running_mean.add_(1)
    after = m(x)
    assert not torch.equal(before, after)
    with torch.enable_grad(): torch.testing.assert_close(after, m(x).detach(), rtol=0, atol=0)

def test_a_layer_that_keeps_a_kernel_can_be_copied():
    torch.manual_seed(0)
    for m in (layer(), layer(nn.Conv2d(8, 8, 3, padding=1)), RepQLayer(nn.Conv2d(8, 8, 3, padding=1))):
        x = torch.randn(8, 8, 6, 6).relu()
        m(x); m.eval()
        with torch.no_grad(): m(x)
        m.train(); m(x).sum().backward()
        torch.optim.SGD(m.parameters(), .1).step()
        twin = copy.deepcopy(m).eval()
        torch.testing.assert_close(twin(x), m.eval()(x))
        pickle.loads(pickle.dumps(twin))

def test_rows_and_their_file(tmp_path):
    file = tmp_path/'rows.json'
    res = CliRunner().invoke(app, ['bench', 'train-step', 'ac_resnet18_tiny', '--size', '8', '--batch-size', '4', '--rounds', '1', '--only', 'repq-bnest', '--json', str(file)])
    assert res.exit_code == 0, res.output
    d = json.loads(file.read_text())
    assert {'command', 'torch', 'device', 'date'} <= set(d)
    assert [(r['stage'], r['method']) for r in d['rows']] == [('full precision', 'plain'), ('4 bits', 'plain'), ('4 bits', 'repq-bnest')]
    assert all(r['step_ratio'] > 0 and r['memory_ratio'] > 0 for r in d['rows'])

def test_super_resolution_is_measured_with_its_own_data():
    rows = train_step('plainsr_m4c8', 2, 16, rounds=1, only=['merged'])
    assert {r['stage'] for r in rows} == {'full precision', '4 bits'}

REPVGG = """import torch.nn as nn
from parts import width
print('made')
def create_RepVGG_A0(deploy=False): return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))
"""
OREPAS = """import torch.nn as nn
from parts import width
class OREPA(nn.Sequential):
    def __init__(self, i, o, kernel_size, stride=1, padding=0, groups=1):
        assert padding == kernel_size//2
        super().__init__(nn.Conv2d(i, o, kernel_size, stride, padding, groups=groups), nn.BatchNorm2d(o))
class OREPA_LargeConv(OREPA): pass
"""
def checkout(folder, file, text):
    folder.mkdir(parents=True)
    (folder/file).write_text(text); (folder/'parts.py').write_text('width = 5')

def test_the_authors_code_takes_part(tmp_path):
    import sys
    checkout(tmp_path/'RepVGG', 'repvgg.py', REPVGG); checkout(tmp_path/'OREPA', 'blocks.py', OREPAS)
    path = list(sys.path)
    for folder in tmp_path, tmp_path/'RepVGG': assert official('repvgg_a0', folder)[0].out_channels == 5
    net = official('orepa_resnet18', tmp_path)
    assert net.stem.conv[0].kernel_size == (7, 7) and isinstance(net.stem.bn, nn.Identity)
    assert not any(isinstance(m, OREPA) for m in net.modules())
    assert sys.path == path and 'parts' not in sys.modules
    res = CliRunner().invoke(app, ['bench', 'train-step', 'orepa_resnet18_tiny', '--size', '8', '--batch-size', '4', '--rounds', '1', '--only', 'merged', '--official', str(tmp_path), '--json', str(tmp_path/'rows.json')])
    assert res.exit_code == 0, res.output
    rows = json.loads((tmp_path/'rows.json').read_text())['rows']
    assert [(r['stage'], r['method']) for r in rows][:2] == [('full precision', 'official'), ('full precision', 'plain')] and rows[0]['step_ratio'] > 0

@pytest.mark.parametrize('model,text,message', [('repvgg_a0', None, 'has no repvgg.py.*DingXiaoH/RepVGG'), ('repvgg_a1', REPVGG, 'has no create_RepVGG_A1.*DingXiaoH/RepVGG'),
                                               ('repvgg_a0', 'import se_block', 'DingXiaoH/RepVGG needs what is missing.*se_block'), ('resnet18', REPVGG, 'not for resnet18')])
def test_what_the_authors_code_lacks_is_named(tmp_path, model, text, message):
    if text: checkout(tmp_path/'RepVGG', 'repvgg.py', text)
    with pytest.raises(ValueError, match=message): official(model, tmp_path)

def test_torchao_takes_part_where_it_is_installed():
    pytest.importorskip('torchao')
    rows = {r['quantizer']: r for r in peers(2, 8, 2, 8, rounds=1, compiled=False)}
    for n in 'moving average', 'learned step': assert rows[f'torchao PT2E, {n}']['quantizer_ms'] > 0 and rows[f'torchao PT2E, {n}']['numerics']

def test_verbs_over_sizes():
    from repq.bench import VERBS, chain, exponent, verb_seconds, verbs
    *rows, last = verbs((10, 104, 200))
    assert [r['modules'] for r in rows] == [10, 103, 199] and last['modules'] == 'exponent'
    assert all(r[v] > 0 for r in rows for v in VERBS)
    assert last['deploy'] == round(exponent([103, 199], [r['deploy'] for r in rows[1:]]), 2)
    model = chain(10)
    before = copy.deepcopy(model.state_dict())
    verb_seconds(model, torch.randn(2, 3, 8, 8))
    close(model.state_dict().values(), before.values())

def test_benchmarks_of_waiting_print_their_columns(monkeypatch):
    "Their tables show every column, and the load ends with the measurement"
    from repq import bench
    from repq.commands.waiting import load
    with load(2) as _: pass
    row = dict(network='small', work=1.9, load=2, seconds_by_threads={1: .04, 2: 1.95}, chosen=1, over_best=0.)
    monkeypatch.setattr(bench, 'threads', lambda rounds: [row])
    monkeypatch.setattr(bench, 'verbs', lambda rounds: [dict(modules=20, reparametrize=.1, quantize=.2, calibrate=.3, deploy=.4, merge=.5)])
    for command, words in ('threads', [*row, '{1: 0.04, 2: 1.95}']), ('verbs', ['modules', 'reparametrize', 'quantize', 'calibrate', 'deploy', 'merge', '0.40']):
        res = CliRunner().invoke(app, ['bench', command])
        assert res.exit_code == 0 and all(w in res.output for w in words), res.output
