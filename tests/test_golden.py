"What the authors' own modules compute, against ours: checkpoints read, outputs, merged kernels, a training step."
import copy, importlib.util, json
import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F
from helpers import close
from repq.batchnorm import fold
from repq.blocks import ACBlock, Block, DiverseBranchBlock, MobileOneBlock, QARepVGGBlock, RepSRBlock, RepVGGBlock
from repq.checkpoints import from_official, load_official, to_official
from repq.ecb import ECB
from repq.kernels import impulse_response
from repq.models import create_model
from repq.orepa import OREPA, OREPA1x1, OREPALargeKernel
from repq.quantizers import fake_quantize, grid, min_error_step
from repq.surgery import deploy, merge

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

@pytest.fixture
def golden(shared):
    folder = shared/'golden'
    if not folder.is_dir(): pytest.skip(f'no golden vectors at {folder}')
    return lambda name: Golden(folder, name)

# An official class, as its file names it -> our module for its arguments

def with_bn(cls): return lambda **a: nn.Sequential(cls(**a), nn.BatchNorm2d(a['out_channels']))

def ecb(inp_planes, out_planes, depth_multiplier, act_type, with_idt):
    block = ECB(inp_planes, out_planes, depth_multiplier=depth_multiplier, with_identity=with_idt)
    return nn.Sequential(block, {'prelu': lambda: nn.PReLU(out_planes), 'linear': nn.Identity}[act_type]())

MODULES = {'RepVGGBlock': RepVGGBlock, 'ACBlock': ACBlock, 'DiverseBranchBlock': DiverseBranchBlock, 'MobileOneBlock': MobileOneBlock, 'QARepVGGBlockV2': QARepVGGBlock, 'OREPA': with_bn(OREPA),
           'OREPA_1x1': with_bn(OREPA1x1), 'OREPA_LargeConv': with_bn(OREPALargeKernel), 'ECB': ecb, 'RepSR_Block': lambda c: RepSRBlock(c, c)}
NETWORKS = {'create_RepVGG_A0': 'repvgg_a0', 'ECBSR': 'ecbsr_m4c8'}
BLOCKS = ['repvgg_block_s1', 'acblock_k3', 'dbb_k3_s1', 'mobileone_dw', 'qarepvgg_v2_s1', 'orepa_k3_s1', 'ecb']

def module_of(g): return MODULES[g.g['source']['class']](**g.g['source']['args'])
def block_of(module): return module if isinstance(module, Block) else module[0]

def check_eval(module, g):
    act = F.relu if g.g['activation'] == 'relu' else lambda x: x # other activations are in the module
    module.eval()
    with torch.no_grad():
        for m in module, deploy(module, verbose=False), merge(module, verbose=False): close(act(m(g.x)), g['eval'], 1e-5, 'eval')
        if 'preact' in g.g['outputs']: close(block_of(module)(g.x), g['preact'], 1e-5, 'without activation')
        final = deploy(module, verbose=False)
        conv = final if isinstance(final, nn.Conv2d) else final[0]
        close(conv.weight, g['kernel'], 1e-5, 'kernel'); close(conv.bias, g['bias'], 1e-5, 'bias')
        b = block_of(module)
        if b is module: close(impulse_response(b, b.in_channels, b.kernel_size, b.stride, b.padding, b.dilation, b.groups).weight, g['kernel'], 1e-5, 'impulse response')

def check_train(module, g, outputs=True, but=()):
    "A training step, through the branches and through the merged kernel: outputs and running statistics"
    act, state = F.relu if g.g['activation'] == 'relu' else lambda x: x, copy.deepcopy(module.state_dict())
    for merged in False, True:
        module.load_state_dict(state); module.train()
        block, rest = block_of(module), nn.Sequential() if module is block_of(module) else module[1:]
        y = rest(block.convolve(g.x, *block.kernel(g.x)) if merged else block(g.x))
        if outputs: close(act(y), g['train'], 1e-5, f'train, merged={merged}')
        after = to_official(module)
        for key in g.g['outputs']:
            if key.startswith('after/') and not any(b in key for b in but): close(after[key[len('after/'):]], g[key], 1e-5, f'{key}, merged={merged}')
    module.load_state_dict(state)

@pytest.mark.parametrize('name', BLOCKS)
def test_block(golden, name):
    g = golden(name)
    module = load_official(module_of(g), g.state)
    official = to_official(module)
    assert official.keys() == g.g['keys'].keys()
    for k, v in g.state.items(): assert torch.equal(official[k], v), k
    check_eval(module, g)
    if name.startswith('dbb'): check_train(module, g, outputs=False, but=('avgbn', 'bn2')) # see test_dbb_border
    else: check_train(module, g)

@pytest.mark.parametrize('name', ['net_repvgg_a0', 'net_ecbsr_m4c8'])
def test_network(golden, name):
    g = golden(name)
    wrapped = {'state_dict': {f'module.{k}': v for k, v in g.state.items()}}
    model, origin = from_official(wrapped)
    assert origin.model == NETWORKS[g.g['source']['class']] and not origin.deployed
    merged = merge(model, verbose=False)
    back, origin = from_official(to_official(merged))
    assert origin.deployed
    with torch.no_grad():
        for m in load_official(create_model(origin.model), wrapped).eval(), model, merged, back: close(m(g.x), g['eval'], 1e-5, name)

def test_other_files(golden, shared):
    "Whatever else lies in the folder, of classes that are known here"
    for file in sorted((shared/'golden').glob('*.json')):
        g = json.loads(file.read_text())
        if g.get('kind') == 'block' and file.stem not in BLOCKS and g['source']['class'] in MODULES: test_block(lambda _: golden(file.stem), 'dbb' if 'dbb' in file.stem else file.stem)

def test_dbb_border(golden):
    "In training the authors fill the border behind an inner batch norm by its running statistics, here it is the batch's: where that shows, how much, and that nothing else differs"
    g = golden('dbb_k3_s1')
    ours = load_official(module_of(g), g.state).train()
    theirs = copy.deepcopy(ours)

    def ring(inner, rest, x): # as the authors do it: batch norm, then a border by the running statistics, which this step has advanced already
        y = inner(x)
        value = fold(inner, inner.running_mean, inner.running_var)[1].detach().view(1, -1, 1, 1)
        out = value.expand(len(y), -1, y.shape[2] + 2, y.shape[3] + 2).clone()
        out[:, :, 1:-1, 1:-1] = y
        return rest(out), value
    b = theirs.branches
    (conv, inner, pool, last), (first, middle, kxk, end) = b.avg, b.deep
    avg, _ = ring(inner, pool, conv(g.x))
    deep, value = ring(middle, kxk, first.kernel().conv(g.x))
    point, origin = b.point(g.x), b.origin.bn(F.conv2d(g.x, b.origin.conv.weight, padding=1))
    close(origin + point + last(avg) + end(deep), g['train'], 1e-5, "the authors' rule gives the authors' numbers")
    for k, v in to_official(theirs).items():
        if f'after/{k}' in g.g['outputs']: close(v, g[f'after/{k}'], 1e-5, k)

    with torch.no_grad():
        x = first.kernel().conv(g.x)
        scale, shift = fold(middle, x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
        mine = kxk(F.pad(x, (1, 1, 1, 1))*scale.view(-1, 1, 1) + shift.view(-1, 1, 1)) # before the last batch norm
        close(ours(g.x), ours.convolve(g.x, *ours.kernel(g.x)), 1e-5, 'branched and merged agree with each other')
        close(mine[:, :, 1:-1, 1:-1], deep[:, :, 1:-1, 1:-1], 1e-5, 'away from the border')
        bound = (kxk.weight.abs().sum((2, 3)) @ (shift - value.flatten()).abs()).view(1, -1, 1, 1) # no more than all taps on the border
        assert ((mine - deep).abs() <= bound + 1e-5).all() and (mine - deep).abs().max() > 1e-3

def test_bare_blocks(golden):
    "ECB without its activation: passed over with a warning; OREPA without its batch norm: refused, and nothing changed"
    g = golden('ecb')
    with pytest.warns(UserWarning, match='act.weight'): block = load_official(ECB(8, 8), g.state)
    with torch.no_grad(): close(block(g.x), g['preact'], 1e-5)
    g, block = golden('orepa_k3_s1'), OREPA(8, 8)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match='BatchNorm2d'): load_official(block, g.state)
    for k, v in block.state_dict().items(): assert torch.equal(v, before[k])

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
