"What the authors' own modules compute, against blocks composed of ours."
import importlib.util, json
import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F
from helpers import close
from repq.blocks import ACBlock, Block, RepVGGBlock, conv_bn
from repq.kernels import Kernel, impulse_response
from repq.quantizers import fake_quantize, grid, min_error_step

class Golden:
    "One golden file: official state dict, input and outputs"
    def __init__(self, folder, name):
        spec = importlib.util.spec_from_file_location('fill', folder/'fill.py')
        fill = importlib.util.module_from_spec(spec); spec.loader.exec_module(fill)
        self.g = json.loads((folder/f'{name}.json').read_text())
        self.npz = np.load(folder/f'{name}.npz') if (folder/f'{name}.npz').exists() else {}
        filled = {k: fill.fill(k, s, self.g['seed']) for k, s in self.g['keys'].items()}
        self.state = {k: torch.from_numpy(np.asarray(v)) for k, v in filled.items() if v is not None}
        if self.g['input_kind'] != 'stored': self.x = torch.from_numpy(fill.input(self.g['seed'], self.g['input_shape'], self.g['input_kind']))

    def __getitem__(self, key):
        o = self.g['outputs'][key]
        v = self.npz[key] if o.get('npz') else np.asarray(o['values'], np.float32).reshape(o['shape'])
        return torch.from_numpy(np.asarray(v))

    def linear(self, key):
        "The output without activation: 'preact' where there is one"
        return self['preact'] if 'preact' in self.g['outputs'] and key == 'eval' else self[key]

@pytest.fixture
def golden(shared):
    folder = shared/'golden'
    if not folder.is_dir(): pytest.skip(f'no golden vectors at {folder}')
    return lambda name: Golden(folder, name)

def load(block, g, names):
    "The official state dict into `block`; `names` maps prefixes of the official keys to ours, which must cover both sides"
    def ours(k):
        p = max((p for p in names if k.startswith(p)), key=len, default=None)
        return None if p is None else names[p] + k[len(p):]
    state = {ours(k): v for k, v in g.state.items()}
    assert None not in state, 'an official key was forgotten'
    block.load_state_dict(state, strict=False)
    missing = block.state_dict().keys() - state.keys()
    assert not state.keys() - block.state_dict().keys() and all('mask' in k for k in missing), (missing, state.keys())
    return block, {ours(k): k for k in g.state}

def check(g, block, official, train=True, but=()):
    act = {'relu': F.relu, 'none': lambda x: x}[g.g['activation']]
    block.eval()
    with torch.no_grad():
        close(block(g.x), g.linear('eval'), 1e-5, 'eval')
        close(act(block(g.x)), g['eval'], 1e-5, 'with activation')
        k = block.kernel()
        close(k.weight, g['kernel'], 1e-5, 'kernel'); close(k.bias, g['bias'], 1e-5, 'bias')
        close(block.deploy()(g.x), g.linear('eval'), 1e-5, 'deployed')
    measured = impulse_response(block, block.in_channels, block.kernel_size, padding=block.padding, groups=block.groups)
    close(measured.weight, g['kernel'], 1e-5, 'impulse response')
    start = {k: v.clone() for k, v in block.state_dict().items()}
    for merged in False, True:
        block.load_state_dict(start)
        block.train()
        y = block.convolve(g.x, *block.kernel(g.x)) if merged else block(g.x)
        if train: close(act(y), g['train'], 1e-5, f'train, merged={merged}')
        after = {k: v for k, v in block.state_dict().items() if 'running' in k and not any(b in k for b in but)}
        for k, v in after.items(): close(v, g['after/'+official[k]], 1e-5, f'{k} after a step, merged={merged}')

def args(g): return g.g['source']['args']

def test_repvgg(golden):
    g = golden('repvgg_block_s1')
    block = RepVGGBlock(**args(g))
    check(g, *load(block, g, {'rbr_dense': 'branches.dense', 'rbr_1x1': 'branches.point', 'rbr_identity': 'branches.identity'}))

def test_acnet(golden):
    g = golden('acblock_k3')
    names = {f'{a}_{m}': f'branches.{b}.{m}' for a, b in dict(square='square', ver='vertical', hor='horizontal').items() for m in ('conv', 'bn')}
    check(g, *load(ACBlock(**args(g)), g, names))

def test_qarepvgg(golden):
    "`BN(BN(3×3) + 1×1 + x)`"
    g = golden('qarepvgg_v2_s1')
    inner = Block(dict(dense=conv_bn(8, 8, 3), point=nn.Conv2d(8, 8, 1, bias=False), identity=nn.Identity()), padding=0)
    block = Block([nn.Sequential(inner, nn.BatchNorm2d(8))], padding=1)
    check(g, *load(block, g, {'rbr_dense': 'branches.0.0.branches.dense', 'rbr_1x1': 'branches.0.0.branches.point', 'bn': 'branches.0.1'}))

def test_mobileone(golden):
    "Four depthwise 3×3, a 1×1 and the identity, each with its batch norm"
    g = golden('mobileone_dw')
    branches = {f'conv{i}': conv_bn(8, 8, 3, groups=8) for i in range(4)} | dict(scale=conv_bn(8, 8, 1, groups=8), skip=nn.BatchNorm2d(8))
    names = {f'rbr_conv.{i}': f'branches.conv{i}' for i in range(4)} | {'rbr_scale': 'branches.scale', 'rbr_skip': 'branches.skip'}
    check(g, *load(Block(branches, padding=1), g, names))

def test_dbb(golden):
    "In evaluation; in training the authors pad with running statistics, so that only what comes before a border agrees"
    g = golden('dbb_k3_s1')
    avg = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AvgPool2d(3, 1), nn.BatchNorm2d(8))
    deep = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
    block = Block(dict(origin=conv_bn(8, 8, 3), avg=avg, point=conv_bn(8, 8, 1), deep=deep), padding=1)
    names = {'dbb_origin': 'branches.origin', 'dbb_1x1': 'branches.point', 'dbb_avg.conv': 'branches.avg.0', 'dbb_avg.bn.bn': 'branches.avg.1', 'dbb_avg.avgbn': 'branches.avg.3',
             'dbb_1x1_kxk.idconv1': 'branches.deep.0', 'dbb_1x1_kxk.bn1.bn': 'branches.deep.1', 'dbb_1x1_kxk.conv2': 'branches.deep.2', 'dbb_1x1_kxk.bn2': 'branches.deep.3'}
    key = 'dbb_1x1_kxk.idconv1.weight' # the authors' first convolution is the identity plus this
    g.state[key] = g.state[key] + torch.eye(8).view(8, 8, 1, 1)
    check(g, *load(block, g, names), train=False, but=('avg.3', 'deep.3'))

class Edge(nn.Module):
    "A depthwise edge filter with a trained scale: an operation of a user's own, which only has to show its kernel"
    def __init__(self, mask):
        super().__init__()
        n = len(mask)
        self.scale, self.bias = nn.Parameter(torch.ones(n, 1, 1, 1)), nn.Parameter(torch.zeros(n))
        self.register_buffer('mask', mask)
    def kernel(self): return Kernel(self.scale*self.mask, self.bias, len(self.mask))

def test_ecb(golden):
    g = golden('ecb')
    sobel = torch.tensor([[1., 0, -1], [2, 0, -2], [1, 0, -1]])
    masks = dict(sbx=sobel, sby=sobel.T, lpl=torch.tensor([[0., 1, 0], [1, -4, 1], [0, 1, 0]]))
    branches = {n: nn.Sequential(nn.Conv2d(8, 8, 1), Edge(m.expand(8, 1, 3, 3).clone())) for n, m in masks.items()}
    branches |= dict(conv=nn.Conv2d(8, 8, 3), deep=nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3)))
    names = {'conv3x3': 'branches.conv', 'act': 'act'}
    for n, b in dict(sbx='sbx', sby='sby', lpl='lpl').items():
        names |= {f'conv1x1_{n}.k0': f'branches.{b}.0.weight', f'conv1x1_{n}.b0': f'branches.{b}.0.bias', f'conv1x1_{n}.scale': f'branches.{b}.1.scale', f'conv1x1_{n}.bias': f'branches.{b}.1.bias'}
    names |= {'conv1x1_3x3.k0': 'branches.deep.0.weight', 'conv1x1_3x3.b0': 'branches.deep.0.bias', 'conv1x1_3x3.k1': 'branches.deep.1.weight', 'conv1x1_3x3.b1': 'branches.deep.1.bias'}
    slope = g.state.pop('act.weight')
    block, _ = load(Block(branches, padding=1), g, names)
    for mode in True, False:
        with torch.no_grad():
            y = block.train(mode)(g.x)
            close(y, g['preact'], 1e-5, 'branches'); close(F.prelu(y, slope), g['train'], 1e-5, 'with PReLU')
            k = block.kernel(g.x if mode else None)
            close(k.weight, g['kernel'], 1e-5, 'kernel'); close(k.bias, g['bias'], 1e-5, 'bias')

def test_lsq(golden):
    "Forward and both gradients against the float64 formula"
    g = golden('lsq_per_tensor')
    for name, c in g.g['configs'].items():
        v, s = g[f'{name}/v'].clone().requires_grad_(), g[f'{name}/s'].reshape(()).clone().requires_grad_()
        qn, qp = grid(c['bits'], c['signed'])
        assert (-qn, qp) == (c['qn'], c['qp'])
        y = fake_quantize(v, s, qn, qp)
        y.backward(g[f'{name}/g'])
        close(y.detach(), g[f'{name}/vhat'], 1e-5, name); close(v.grad, g[f'{name}/grad_v'], 1e-5, name); close(s.grad, g[f'{name}/grad_s'].reshape(()), 1e-4, name)

def test_min_error(golden):
    g = golden('minerror_normal')
    for s in g.g['steps']:
        got = min_error_step(g.x, s['qmin'], s['qmax']).item()
        assert any(abs(got/w - 1) < 1e-5 for w in [s['step'], *(t[1] for t in s['ties'])]), f'{s["bits"]} bits: {got} is neither {s["step"]} nor one of its ties'
