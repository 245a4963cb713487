"Deployed networks: copies of every kind give the same numbers, files are small, read anywhere and refuse what is damaged or another network's."
import copy, io, os, pickle, subprocess, sys, warnings
from pathlib import Path
import pytest, torch, torch.nn.functional as F, torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from helpers import FULLGRAPH, randomize
from repq.blocks import RepVGGBlock
from repq.deploy.deployed import FORMAT, _header, _text_tensor, load_deployed, save_deployed
from repq.integers import to_integer
from repq.layers import RepQLayer
from repq.models import create_model
from repq.quantizers import LSQ
from repq.surgery import add_norms, calibrate, deploy, quantize, quantize_sums, reparametrize

quiet = dict(verbose=False)

class Branching(nn.Module):
    "Which way it goes depends on the values: no tracing"
    def __init__(self): super().__init__(); self.a, self.b, self.bn, self.act, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Linear(8, 5)
    def forward(self, x):
        x = self.act(self.bn(self.a(x)))
        if x.mean() > -10: x = self.b(x)
        return self.fc(x.mean((2, 3)))

class Several(nn.Module):
    "Two inputs, a default, a dictionary out"
    def __init__(self): super().__init__(); self.a, self.b, self.up, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, 2, dilation=2), nn.GELU()
    def forward(self, x, y, skip=None):
        z = self.act(self.a(x)) + self.b(y).sigmoid()
        if skip is not None: z = z + skip
        return dict(map=self.up(z), mean=z.mean((2, 3)), some=z.view(z.size(0), -1)[:, ::7])

class Shared(nn.Module):
    "One convolution in two places"
    def __init__(self): super().__init__(); self.stem, self.a, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6); self.b = self.a
    def forward(self, x): return self.b(self.norm(self.a(self.stem(x)))).flatten(1)

class Tied(nn.Module):
    "Two floating-point layers with one weight"
    def __init__(self): super().__init__(); self.a, self.up, self.down = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3); self.down.weight = self.up.weight
    def forward(self, x): return self.down(self.up(self.a(x)).relu())

class Attention(nn.Module):
    def __init__(self): super().__init__(); self.stem, self.attn, self.norm, self.fc = nn.Conv2d(3, 16, 4, 4), nn.MultiheadAttention(16, 2, batch_first=True), nn.LayerNorm(16), nn.Linear(16, 4); self.position = nn.Parameter(torch.randn(64, 16))
    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2) + self.position
        return self.fc(self.norm(x + self.attn(x, x, x, need_weights=False)[0]))[:, 0]

tv = torchvision.models
def swin(): return tv.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=5)
def convnext(): return tv.ConvNeXt([tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)], stochastic_depth_prob=.3, num_classes=5)
def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 16), nn.BatchNorm1d(16), nn.Hardswish(), nn.Linear(16, 3))
def normed(): return add_norms(quantize(create_model('repvgg_a0_tiny', 5, 3), 2, 2, **quiet), **quiet)
def wide(): return quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Mish(), nn.Conv2d(4, 4, 3, groups=2)), 12, 16, per_channel=False, first_last_bits=None, **quiet)
def summed(): return quantize_sums(quantize(create_model('resnet18_tiny', 5, 3), 4, 4, **quiet))
def reparametrized(): return reparametrize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding_mode='reflect', padding=1)), RepVGGBlock, **quiet)

NETS = { # name: (network in plain form, does its file read without it?)
    **{n: (lambda n=n: create_model(n, 5, 3), True) for n in ('repvgg_a0_tiny', 'ac_resnet18_tiny', 'mobileone_s0_tiny', 'orepa_resnet18_tiny', 'qarepvgg_a0_small')},
    'ecbsr': (lambda: create_model('ecbsr_m4c8', in_channels=3), True), 'resnet18': (lambda: tv.resnet18(num_classes=5), True), 'mobilenet_v3': (lambda: tv.mobilenet_v3_small(num_classes=5), True),
    'squeezenet': (lambda: tv.squeezenet1_1(num_classes=5), True), 'shufflenet': (lambda: tv.shufflenet_v2_x0_5(num_classes=5), True), 'convnext': (convnext, True), 'swin': (swin, False), 'mlp': (mlp, True), 'one convolution': (lambda: nn.Conv2d(3, 4, 3), True),
    'branching': (Branching, False), 'several': (Several, True), 'shared': (Shared, True), 'tied': (Tied, True), 'attention': (Attention, True), 'reparametrized': (reparametrized, True)}
QUANTIZED = {'normed': (normed, lambda: create_model('repvgg_a0_tiny', 5, 3)), 'wide': (wide, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Mish(), nn.Conv2d(4, 4, 3, groups=2))), 'summed': (summed, None)}

def batch(name, n=2, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, size, size, generator=g)
    return (x, x.flip(0)) if name == 'several' else (x,)

def deployed(name, bits=4):
    torch.manual_seed(0)
    if name in QUANTIZED: net = QUANTIZED[name][0]()
    else: net = quantize(randomize(NETS[name][0]()), bits, bits, **quiet)
    net.train()(*batch(name, 8))
    return deploy(net.eval(), **quiet)

def leaves(v): return torch.utils._pytree.tree_leaves(v)
def same(a, b):
    a, b = leaves(a), leaves(b)
    assert len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b))

@pytest.mark.parametrize('name', [n for n in NETS] + [*QUANTIZED])
def test_files(name, tmp_path):
    net, path = deployed(name), tmp_path/'net.safetensors'
    save_deployed(net, path, **quiet)
    plain, alone = (QUANTIZED[name][1], True) if name in QUANTIZED else NETS[name]
    torch.manual_seed(1) # other weights
    read = ([load_deployed(path)] if alone else []) + ([load_deployed(path, plain())] if plain else [])
    if not alone:
        with pytest.raises(ValueError, match='holds no graph.*load_deployed.path, model'): load_deployed(path)
    fixed = name in ('mlp', 'attention')
    for x in batch(name), batch(name, 3, 32 if fixed else 40, 1):
        with torch.no_grad():
            for other in read: same(other(*x), net(*x))
    for other in read: assert not other.training and {n: m.block.bits for n, m in other.named_modules() if isinstance(m, RepQLayer)}.values() and not any(isinstance(m, LSQ) for m in other.modules())

@pytest.mark.parametrize('name', ['repvgg_a0_tiny', 'branching', 'several', 'summed'])
def test_copies(name):
    net, x = deployed(name), batch(name)
    with torch.no_grad(): want = net(*x)
    assert not any(isinstance(m, LSQ) for m in net.modules())
    for grad in (False, True):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            inputs = tuple(t.clone().requires_grad_(grad) for t in x)
            same(net(*inputs), want); same(copy.deepcopy(net)(*inputs), want); same(pickle.loads(pickle.dumps(net))(*inputs), want)
            file = io.BytesIO()
            torch.jit.save(torch.jit.trace(net, inputs, strict=False), file); file.seek(0)
            same(torch.jit.load(file)(*inputs), want)
            if name in ('branching', 'summed'): continue # torch.export refuses what depends on values; and is slow
            program = torch.export.export(net, inputs, dynamic_shapes=tuple({0: torch.export.Dim('batch', min=2)} for _ in inputs))
            more = tuple(torch.cat([t, t, t]) for t in x)
            same(program.module()(*inputs), want)
            with torch.no_grad(): same(program.module()(*more), net(*more))

def test_compile():
    net, x = deployed('repvgg_a0_tiny'), batch('repvgg_a0_tiny')
    try: got = torch.compile(net, backend='eager', fullgraph=FULLGRAPH)(*x)
    finally: torch.compiler.reset()
    same(got, net(*x))

def test_size(tmp_path):
    "The integers and a scale and a bias for each channel, and little beside them"
    for make, bits, share in ((lambda: tv.resnet18(num_classes=10), 4, .01), (lambda: create_model('resnet18_small', 10, 3), 2, .06), (lambda: create_model('resnet18_small', 10, 3), 8, .02)):
        net = quantize(make(), bits, bits, first_last_bits=None, **quiet)
        for q in (m for m in net.modules() if isinstance(m, LSQ)): q.n_candidates = 3
        net.train()(torch.randn(2, 3, 32, 32))
        save_deployed(net, path := tmp_path/f'{bits}.safetensors', overwrite=True, **quiet)
        layers = [m for m in net.modules() if isinstance(m, RepQLayer)]
        integers, channels = sum(m.block.kernel().weight.numel() for m in layers)*bits/8, sum(m.block.out_channels for m in layers)
        assert integers + 8*channels < path.stat().st_size < (integers + 8*channels)*(1 + share)

def test_fresh_process(tmp_path):
    net, path = deployed('squeezenet'), tmp_path/'net.safetensors'
    x = batch('squeezenet')
    save_deployed(net, path, **quiet); torch.save(x[0], tmp_path/'x.pt')
    text = "import sys, torch; from repq.deployed import load_deployed; torch.set_num_threads(1)\nwith torch.no_grad(): torch.save(load_deployed(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3]); assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, '-c', text, path, tmp_path/'x.pt', tmp_path/'y.pt'], check=True, env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get('PYTHONPATH', '')])})
    with torch.no_grad(): same(torch.load(tmp_path/'y.pt'), net(*x))

def test_read_network_is_one_of_ours(tmp_path):
    "Integers, another file, and what a layer says of itself"
    net, path, x = deployed('repvgg_a0_tiny'), tmp_path/'net.safetensors', batch('repvgg_a0_tiny')[0]
    save_deployed(net, path, **quiet)
    again = load_deployed(path)
    assert torch.equal(to_integer(again, x)(x), to_integer(net, x)(x))
    save_deployed(again, tmp_path/'again.safetensors', **quiet)
    same(load_deployed(tmp_path/'again.safetensors')(x), net(x))
    state = {k: v for k, v in net.state_dict().items() if not k.endswith('_extra_state')}
    assert all(torch.equal(again.state_dict()[k], v) for k, v in state.items())

def test_weights_keep_their_type(tmp_path):
    torch.manual_seed(0)
    net = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, dilation=2)), 4, 4, **quiet)
    net(torch.randn(2, 3, 8, 8))
    half = deploy(net, **quiet).to(torch.bfloat16)
    save_deployed(half, path := tmp_path/'half.safetensors', **quiet)
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    for other in load_deployed(path), load_deployed(path, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, dilation=2))): same(other(x), half(x))

CHANNELS_LAST = {'own': lambda: create_model('ac_resnet18_tiny', 5, 3), 'shuffled': lambda: tv.shufflenet_v2_x0_5(num_classes=5), 'attention': Attention,
                 'plain': lambda: nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding_mode='reflect', padding=1), nn.Flatten(), nn.Linear(4*16*16, 3))}
@pytest.mark.parametrize('kind', CHANNELS_LAST)
def test_memory_formats(kind, tmp_path):
    "Channels-last weights and images give what others give (in float64, where another order of a sum does not turn a rounding)"
    torch.manual_seed(0)
    plain, x, last = randomize(CHANNELS_LAST[kind]()).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64), dict(memory_format=torch.channels_last)
    nets = []
    for weights, images in ((plain, x), (copy.deepcopy(plain).to(**last), x.to(**last))):
        d = deploy(calibrate(quantize(weights, 8, 8, **quiet), [images]), **quiet)
        save_deployed(d, path := tmp_path/f'{len(nets)}.safetensors', **quiet)
        nets += [d, load_deployed(path), load_deployed(path, copy.deepcopy(weights)), copy.deepcopy(d).to(**last)]
    for net in nets:
        for images in x, x.to(**last): torch.testing.assert_close(net(images), nets[0](x), rtol=1e-9, atol=1e-9)
    if kind == 'own':
        integers = to_integer(nets[0], x.float())
        assert torch.equal(integers(x.float().to(**last)), integers(x.float()))

# refusals

def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match='no quantized layer'): save_deployed(nn.Sequential(nn.Conv2d(3, 3, 1)), tmp_path/'a.safetensors')
    with pytest.raises(ValueError, match='must end in .safetensors'): save_deployed(deployed('mlp'), tmp_path/'a.pt')
    with pytest.raises(ValueError, match='no step yet'): save_deployed(quantize(nn.Conv2d(3, 3, 1), **quiet), tmp_path/'a.safetensors')
    with pytest.raises(TypeError, match='must be an nn.Module'): save_deployed('net', tmp_path/'a.safetensors')
    save_deployed(deployed('mlp'), tmp_path/'a.safetensors', **quiet)
    with pytest.raises(FileExistsError, match='overwrite=True'): save_deployed(deployed('mlp'), tmp_path/'a.safetensors')
    save_deployed(deployed('mlp'), tmp_path/'a.safetensors', overwrite=True, **quiet)
    assert [p.name for p in tmp_path.iterdir()] == ['a.safetensors']

def test_why_there_is_no_graph(tmp_path, capsys):
    class Made(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Conv2d(3, 3, 1)
        def forward(self, x): return self.a(x) + torch.ones(3, 1, 1)
    class Own(nn.Module):
        def forward(self, x): return x.relu() if x.sum() > 0 else x
    for net, why in ((Made(), 'tensor made in its forward'), (nn.Sequential(nn.Conv2d(3, 3, 1), Own()), 'cannot be traced'), (swin(), 'no function of torch')):
        q = quantize(net, 4, 4, **quiet); q(torch.rand(2, 3, 32, 32))
        save_deployed(q, tmp_path/'n.safetensors', overwrite=True)
        assert why in (text := capsys.readouterr().out) and 'load_deployed(path, model)' in text, text

@pytest.mark.parametrize('other, words', [
    (lambda: create_model('repvgg_b0_tiny', 5, 3), "'stem.conv' has out_channels 12 instead of 8"), (lambda: create_model('repvgg_a0_tiny', 7, 3), "'head' has"), (lambda: create_model('resnet18_tiny', 5, 3), 'the nearest are'), (lambda: nn.Linear(3, 3), 'the model has no'),
    (lambda: nn.Sequential(*create_model('repvgg_a0_tiny', 5, 3)), 'the model has no'), (lambda: replaced(create_model('repvgg_a0_tiny', 5, 3), 'stem.act', nn.SiLU()), "'stem.act' is a SiLU in the model and a ReLU in the file"),
    (lambda: replaced(create_model('repvgg_a0_tiny', 5, 3), 'pool', nn.AdaptiveAvgPool2d(2)), "'pool', a AdaptiveAvgPool2d, has output_size=2 instead of 1"), (lambda: replaced(create_model('repvgg_a0_tiny', 5, 3), 'more', nn.ReLU()), "the model has 'more', which the file has not")])
def test_another_architecture(other, words, tmp_path):
    save_deployed(deployed('repvgg_a0_tiny'), path := tmp_path/'net.safetensors', **quiet)
    with pytest.raises(ValueError) as e: load_deployed(path, other())
    assert words in str(e.value) and str(path) in str(e.value), str(e.value)

def replaced(model, name, m): model.add_module(name, m) if '.' not in name else model.set_submodule(name, m); return model

def header_of(path): t = load_file(path); return _header(t.pop(FORMAT)), t
def write(path, header, tensors): save_file(tensors | {FORMAT: _text_tensor(header)}, path)

def places(v, at=()):
    "Every place in a header"
    yield at
    for k, i in (v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ()): yield from places(i, (*at, k))

def changed(header, at, value):
    header = copy.deepcopy(header)
    if not at: return value
    inner = header
    for k in at[:-1]: inner = inner[k]
    if value is KeyError: del inner[at[-1]]
    else: inner[at[-1]] = value
    return header

def test_damaged_headers(tmp_path):
    "Any field gone or of another kind: a ValueError that names the file, or a network where the field still means one; no other error"
    save_deployed(deployed('tied'), path := tmp_path/'net.safetensors', **quiet)
    header, tensors = header_of(path)
    for at in places(header):
        for value in (KeyError, None, -1, 'x', {'node': 'x'}):
            if at == () and value is KeyError: continue
            write(path, changed(header, at, value), tensors)
            for model in (None, Tied()):
                try: load_deployed(path, model)
                except ValueError as e: assert str(path) in str(e)

def test_damaged_tensors(tmp_path):
    save_deployed(deployed('tied'), path := tmp_path/'net.safetensors', **quiet)
    header, tensors = header_of(path)
    for k, v in tensors.items():
        nan = torch.full_like(v, torch.nan) if v.is_floating_point() else v[:-1]
        for new in (nan, v.float().unsqueeze(0), torch.zeros(0), None):
            write(path, header, {n: t for n, t in {**tensors, k: new}.items() if t is not None})
            for model in (None, Tied()):
                with pytest.raises(ValueError, match=str(path)): load_deployed(path, model)
    for k in [k for k in tensors if k.endswith('.step')]:
        write(path, header, tensors | {k: -tensors[k]})
        with pytest.raises(ValueError, match='steps are positive'): load_deployed(path)

def test_damaged_files(tmp_path):
    save_deployed(deployed('tied'), path := tmp_path/'net.safetensors', **quiet)
    whole = path.read_bytes()
    for data in (whole[:-100], whole[:50], b'', b'{}', pickle.dumps(print), whole.replace(b'repq.deployed', b'repq_deployed')):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=str(path)): load_deployed(path)
    save_file({'a': torch.zeros(1)}, path)
    with pytest.raises(ValueError, match='no deployed network that repq wrote'): load_deployed(path)
    with pytest.raises(FileNotFoundError, match='there is no file'): load_deployed(tmp_path/'no.safetensors')
    path.write_bytes(whole); header, tensors = header_of(path)
    write(path, header | dict(version=2), tensors)
    with pytest.raises(ValueError, match='version 2 of the format'): load_deployed(path)

def test_files_run_nothing(tmp_path):
    "Whatever a graph names, nothing but torch's functions on tensors is called"
    save_deployed(deployed('tied'), path := tmp_path/'net.safetensors', **quiet)
    header, tensors = header_of(path)
    mark = tmp_path/'mark'
    code = f"open({str(mark)!r}, 'w')"
    for row in (['call_function', 'a', 'os.system', [f'touch {mark}'], {}], ['call_function', 'a', 'torch.save', ['x', str(mark)], {}], ['call_method', 'a', '__class__', {'tuple': []}, {'dict': []}],
                ['get_attr', 'a', f'x"+{code}+"', {'tuple': []}, {'dict': []}], ['placeholder', 'a', f'a={code}', {'tuple': []}, {'dict': []}], ['call_function', f'a;{code}', 'torch.relu', {'tuple': [{'node': 'x'}]}, {'dict': []}],
                ['call_function', 'a', 'torch.relu', {'tuple': [{'node': 'x'}]}, {'dict': [[f'b={code},c', 1]]}], ['call_function', 'a', 'torch.nn.functional.os.system', {'tuple': []}, {'dict': []}]):
        write(path, changed(header, ('graph',), [header['graph'][0], row, *header['graph'][1:]]), tensors)
        try: load_deployed(path)(torch.rand(1, 3, 8, 8))
        except (ValueError, TypeError): pass
        assert not mark.exists()
    write(path, changed(header, ('modules', 'up', 'type'), 'Module'), tensors)
    with pytest.raises(ValueError): load_deployed(path)

# fastai

@pytest.fixture
def pictures(tmp_path):
    "A folder of a few image files of two classes"
    from PIL import Image
    rng = torch.Generator().manual_seed(0)
    for split in 'train', 'valid':
        for c, colour in enumerate(('blue', 'red')):
            (tmp_path/'pictures'/split/colour).mkdir(parents=True)
            for i in range(4):
                x = torch.randint(0, 120, (32, 32, 3), generator=rng, dtype=torch.uint8); x[..., 2 - 2*c] += 100
                Image.fromarray(x.numpy()).save(tmp_path/'pictures'/split/colour/f'{i}.png')
    return tmp_path/'pictures'

def learner(kind, pictures):
    "(learner with a quantized network, an item to predict)"
    import fastai.callback.progress, repq.learner # noqa: F401 (they patch Learner)
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    from repq.data import get_dls
    if kind == 'digits': dls, channels = get_dls('digits', bs=64, seed=0, device='cpu'), 1
    elif kind == 'files': dls, channels = get_dls(pictures, size=32, bs=4, seed=0, device='cpu', cache=False), 3
    else:
        from fastai.vision.data import ImageDataLoaders
        dls, channels = ImageDataLoaders.from_folder(pictures, bs=4, num_workers=0, device=torch.device('cpu')), 3
    item = dls.valid_ds[0][0] if kind == 'digits' else pictures/'valid'/'red'/'0.png'
    learn = Learner(dls, create_model('resnet18_tiny', len(dls.vocab), channels), CrossEntropyLossFlat(), metrics=accuracy, path=pictures)
    with learn.no_bar(), learn.no_logging(): learn.quantize(4, 4, n_batches=1, **quiet)
    return learn, item

@pytest.mark.parametrize('kind', ['digits', 'files', 'fastai'])
@pytest.mark.filterwarnings('ignore')
def test_learner(kind, pictures):
    import matplotlib; matplotlib.use('Agg')
    from fastai.learner import load_learner
    learn, item = learner(kind, pictures)
    d = learn.deploy(learner=True, **quiet)
    with learn.no_bar(), d.no_bar(), d.no_logging():
        with torch.no_grad(): want = torch.cat([d.model.eval()(b[0]) for b in d.dls.valid]).softmax(1)
        assert any(isinstance(m, LSQ) for m in learn.model.modules())
        assert d.validate()[0] == pytest.approx(learn.validate()[0], abs=.05) # absorbing batch norms turns a rounding here and there
        torch.testing.assert_close(d.get_preds()[0], want)
        name, index, probs = d.predict(item)
        assert name == d.dls.vocab[int(index)] and len(probs) == len(d.dls.vocab) and probs.argmax() == index
        d.show_results(max_n=4); matplotlib.pyplot.close('all')
        dls, opt = d.dls, d.opt
        d.export('net.pkl')
        assert d.dls is dls and d.opt is opt and len(d.dls.valid_ds)
        torch.testing.assert_close(d.get_preds()[0], want)
        again = load_learner(pictures/'net.pkl')
        with again.no_bar():
            assert torch.equal(again.predict(item)[2], probs)
            torch.testing.assert_close(again.get_preds(dl=d.dls.valid)[0], want)
        with pytest.raises(ValueError, match='nothing to train'): d.fit(1)
        d.validate()

@pytest.mark.filterwarnings('ignore')
def test_aborted_export(pictures):
    "A learner whose export fails is what it was, and so is the file"
    learn, item = learner('digits', pictures)
    d = learn.deploy(learner=True, **quiet)
    d.export('net.pkl'); before = (pictures/'net.pkl').read_bytes()
    class Unpicklable:
        def __reduce__(self): raise RuntimeError('not to be pickled')
    for l in learn, d:
        l.create_opt()
        l.extra, dls, opt = Unpicklable(), l.dls, l.opt
        with pytest.raises(RuntimeError, match='not to be pickled'): l.export('net.pkl')
        assert l.dls is dls and l.opt is opt and (pictures/'net.pkl').read_bytes() == before and not list(pictures.glob('*.tmp'))
        with l.no_bar(), l.no_logging(): l.validate(); l.get_preds()
    from fastai.learner import Learner
    plain = Learner(d.dls, d.model, d.loss_func, path=pictures)
    plain.export('plain.pkl')
    with plain.no_bar(), plain.no_logging(): plain.validate()

@pytest.mark.filterwarnings('ignore')
def test_images_without_labels(pictures):
    "Files, Pillow images and pixels are the same to predict; another size is refused"
    from PIL import Image
    learn, file = learner('files', pictures)
    d = learn.deploy(learner=True, **quiet)
    im = Image.open(file)
    with d.no_bar():
        probs = [d.predict(o)[2] for o in (file, str(file), im, torch.tensor(__import__('numpy').array(im)).permute(2, 0, 1))]
        assert all(torch.equal(p, probs[0]) for p in probs)
        preds, targets = d.get_preds(dl=d.dls.test_dl([file]*3))
        assert preds.shape == (3, 2) and targets is None
        with pytest.raises(ValueError, match='cannot be read'): d.predict(pictures/'nothing.png')
    digits, item = learner('digits', pictures)
    with digits.no_bar():
        with pytest.raises(ValueError, match='was made for .1, 8, 8.'): digits.predict(torch.zeros(9, 9, dtype=torch.uint8))
        with pytest.raises(TypeError, match='uint8'): digits.predict(torch.zeros(8, 8))
        assert torch.equal(digits.predict(item)[2], digits.predict(Image.fromarray(item[0].numpy()))[2])

class Overlooked(nn.Module):
    "Functions that torch does not list among those on tensors"
    def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
    def forward(self, x):
        y = F.hardswish(self.a(x))*F.hardsigmoid(x.mean())
        return F.logsigmoid(F.tanh(F.sigmoid(self.b(y))))

def test_functions_that_torch_overlooks(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = calibrate(quantize(Overlooked(), 4, 4, verbose=False), [x])
    save_deployed(model, tmp_path/'a.safetensors')
    with torch.no_grad(): assert torch.equal(load_deployed(tmp_path/'a.safetensors')(x), deploy(model, verbose=False).eval()(x))
