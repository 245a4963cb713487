"Official checkpoints: every layout there and back, and what is wrong with a file said in one line with nothing changed."
import copy, pickle
import pytest, torch
from torch import nn
from helpers import ALL_BLOCKS, close, randomize, same_state, states
from repq.blocks import Conv3XC, DiverseBranchBlock, LearnableRep, RepMixer, RepVGGBlock
from repq.checkpoints import LAYOUTS, convert, from_official, identify, load_official, read_checkpoint, to_official, unwrap, write_checkpoint
from repq.ecb import ECB
from repq.models import create_model, image_channels, list_models, plain_twin, task
from repq.orepa import OREPA
from repq.surgery import merge, quantize, reparametrize, train_merged

quiet = dict(verbose=False)
def names(): return [n for n in list_models() if plain_twin(n) != n and not n.endswith('_small') and (n.endswith('_tiny') or task(n) != 'classification')]

@pytest.mark.parametrize('name', ALL_BLOCKS)
@pytest.mark.parametrize('kw', [(), (1, None, 1, 4), (2, None, 1, 8)])
def test_blocks_there_and_back(name, kw):
    block = randomize(ALL_BLOCKS[name](8, 8, 3, *kw)).eval()
    other = load_official(randomize(ALL_BLOCKS[name](8, 8, 3, *kw), seed=1), to_official(block)).eval()
    same_state(other.state_dict(), block.state_dict())
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad(): assert torch.equal(other(x), block(x))
    layout = next(iter(set(LAYOUTS) & {l for l in LAYOUTS if type(block) in LAYOUTS[l].blocks and l != 'timm'}))
    conv = block.deploy()
    again = load_official(copy.deepcopy(conv).requires_grad_(False), to_official(conv, layout)) if conv.bias is not None else conv
    same_state(again.state_dict(), conv.state_dict())

def theirs(module, path):
    "A class of a package that may not be there"
    return getattr(pytest.importorskip(module), path)

OTHERS = dict( # ours, theirs, without their activation
    repmixer=(lambda: RepMixer(8, 8, 3, groups=8), lambda: theirs('timm.models.fastvit', 'RepMixer')(8, 3)),
    conv3xc=(lambda: Conv3XC(8, 12), lambda: theirs('spandrel.architectures.SPAN.__arch.span', 'Conv3XC')(8, 12, gain1=2)),
    learnable=(lambda: LearnableRep(8, 8, 3, groups=8), lambda: theirs('libreyolo.models.ppocr.backbones', 'LearnableRepLayer')(8, 8, 3, 1, 8, 4)))

@pytest.mark.parametrize('kind', OTHERS)
def test_blocks_of_others_code(kind):
    "Blocks of today with the weights of the code that they come from, in both modes, there and back"
    ours, other = OTHERS[kind][0](), randomize(OTHERS[kind][1]())
    x = torch.randn(2, 8, 9, 9)
    if kind == 'learnable': other.act = nn.Identity()
    other.eval()(x) # what merges itself does so now
    load_official(ours, other.state_dict())
    for mode in False, True: close(ours.train(mode)(x), other.train(mode)(x), 1e-5)
    back = to_official(ours.eval(), 'timm' if kind == 'repmixer' else None)
    other.eval()(x)
    assert back.keys() == other.state_dict().keys()
    for k, v in back.items(): close(v, other.state_dict()[k], 1e-5)

@pytest.mark.parametrize('name', ['mobileone_s1', 'mobileone_s4'])
def test_mobileone_of_timm(name):
    "The larger ones, the last with squeeze-and-excitation, compute what timm's do"
    other = randomize(pytest.importorskip('timm').create_model(name, num_classes=5)).eval()
    ours, origin = from_official(other.state_dict())
    assert (origin.model, origin.layout) == (name, 'timm')
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): close(ours(x), other(x), 1e-4)
    same_state(to_official(ours, 'timm'), dict(other.state_dict()))
    authors = to_official(ours)
    assert ('stage3.19.se.reduce.weight' in authors) == (name == 'mobileone_s4') and 'stage1.0.rbr_scale.conv.weight' in authors

@pytest.mark.parametrize('name', names())
def test_networks_are_recognized(name):
    sr, channels = task(name) == 'super-resolution', image_channels(name)
    model = randomize(create_model(name, None if sr else 7, channels)).eval()
    for layout in [l for l in LAYOUTS if l != 'timm' or 'mobileone' in name or name.startswith('repvgg')]:
        try: official = to_official(model, layout)
        except ValueError: continue
        back, origin = from_official({'state_dict': {f'module.{k}': v for k, v in official.items()}})
        assert (origin.model, origin.layout, origin.deployed, origin.in_channels) == (name, layout, False, channels)
        same_state(back.state_dict(), model.state_dict())

def test_super_resolution_scales():
    for scale in 2, 3, 4:
        assert identify(to_official(create_model('ecbsr_m4c8', scale=scale))).scale == scale

def test_ac_irregularity():
    keys = to_official(create_model('ac_resnet18_tiny'))
    assert 'stage1.0.conv1.acb.square_conv.weight' in keys and 'stage1.0.conv2.square_conv.weight' in keys and 'conv1.bn.running_var' in keys and 'stage2.0.shortcut.conv.weight' in keys

def test_orepa_keys():
    keys = to_official(create_model('orepa_resnet18'))
    for k in 'stage0.conv1.weight2.vector', 'stage0.conv1.bn.weight', 'stage1.0.conv1.weight_orepa_prior', 'stage1.0.conv1.id_tensor', 'stage2.0.shortcut.conv.weight', 'stage4.1.conv2.weight_orepa_gconv_pw', 'linear.bias': assert k in keys, k
    assert len([k for k in keys if k.endswith('weight_orepa_origin')]) == 3 + 16

def test_counters_and_constants_may_be_missing():
    for block in RepVGGBlock(4, 4), OREPA(4, 4), ECB(4, 4):
        full = to_official(block)
        load_official(block, {k: v for k, v in full.items() if not k.endswith(('num_batches_tracked', 'mask', 'prior', 'avg_avg', 'id_tensor'))})

def changed(state, **new): return {**state, **new}
def without(state, *keys): return {k: v for k, v in state.items() if k not in keys}
A0 = lambda: create_model('repvgg_a0_tiny', 10)
WRONG = { # what: (module, checkpoint of it, words of the message)
    'another width':    (A0, lambda m: to_official(create_model('repvgg_b0_tiny', 10)), 'looks like repvgg_b0_tiny', 'instead of'),
    'another family':   (A0, lambda m: to_official(create_model('orepa_resnet18_tiny', 10)), 'looks like orepa_resnet18_tiny'),
    'more classes':     (A0, lambda m: to_official(create_model('repvgg_a0_tiny', 1000)), 'linear.weight (1000, 32) instead of (10, 32)'),
    'deployed':         (A0, lambda m: to_official(merge(m, **quiet)), 'repvgg_a0_tiny', 'deployed', 'merge(module)'),
    'training form':    (lambda: merge(A0(), **quiet), lambda m: to_official(A0()), 'merged already'),
    'a key missing':    (A0, lambda m: without(to_official(m), 'stage1.0.rbr_1x1.conv.weight'), 'missing: stage1.0.rbr_1x1.conv.weight'),
    'a key too many':   (A0, lambda m: changed(to_official(m), extra=torch.zeros(1)), 'unexpected: extra'),
    'another constant': (lambda: OREPA(4, 4), lambda m: changed(to_official(m), weight_orepa_prior=torch.zeros(4, 3, 3)), 'weight_orepa_prior'),
    'edges turned':     (lambda: ECB(4, 4), lambda m: changed(to_official(m), **{'conv1x1_sbx.mask': -to_official(m)['conv1x1_sbx.mask']}), 'conv1x1_sbx.mask'),
    'torchvision':      (A0, lambda m: __import__('torchvision').models.resnet18().state_dict(), 'torchvision'),
    "repq's own":       (A0, lambda m: m.state_dict(), 'load_state_dict'),
    'quantized':        (lambda: quantize(A0(), **quiet), lambda m: to_official(A0()), 'quantize()'),
    'through the merge': (lambda: train_merged(A0(), **quiet), lambda m: to_official(A0()), 'train_merged()'),
    'unknown module':   (lambda: nn.Linear(2, 2), lambda m: {'weight': torch.zeros(2, 2)}, 'Linear', 'RepVGGBlock'),
    'plain network':    (lambda: create_model('resnet18_tiny'), lambda m: to_official(create_model('ac_resnet18_tiny')), 'no official layout'),
    'a branch of our own': (lambda: reparametrize(nn.Sequential(nn.Conv2d(4, 4, 3)), RepVGGBlock, **quiet)[0], lambda m: to_official(DiverseBranchBlock(4, 4)), 'DBB'),
    'sparse':           (A0, lambda m: changed(to_official(m), **{'stage0.rbr_1x1.conv.weight': to_official(m)['stage0.rbr_1x1.conv.weight'].to_sparse()}), 'stage0.rbr_1x1.conv.weight holds no plain numbers (sparse)'),
    'no numbers':       (A0, lambda m: changed(to_official(m), **{'linear.bias': to_official(m)['linear.bias'].to('meta')}), 'linear.bias holds no plain numbers (nothing)'),
    'complex':          (A0, lambda m: changed(to_official(m), **{'linear.bias': to_official(m)['linear.bias'].to(torch.complex64)}), 'complex64'),
    'integers':         (A0, lambda m: changed(to_official(m), **{'linear.bias': torch.zeros(10, dtype=torch.int8)}), 'int8'),
    'a nameless tensor': (A0, lambda m: {**to_official(m), 3: torch.zeros(1)}, '3 is no name'),
    'empty':            (A0, lambda m: {}, 'empty'),
    'no tensors':       (A0, lambda m: {'epoch': 1}, "'epoch'", 'int'),
    'no dict':          (A0, lambda m: [1], 'list'),
}

@pytest.mark.parametrize('what', WRONG)
def test_wrong_checkpoints(what):
    make, state, *words = WRONG[what]
    module = make()
    state, before = state(module), states(module)
    with pytest.raises((ValueError, TypeError)) as e: load_official(module, state)
    assert '\n' not in str(e.value)
    for w in words: assert w in str(e.value), f'{w!r} is not in: {e.value}'
    same_state(states(module), before)

def test_nearly_a_network():
    "What differs from the nearest network is named, also where none was asked for"
    state = to_official(create_model('repvgg_a0_tiny', 10))
    for bad, words in (without(state, 'stage1.1.rbr_1x1.bn.bias'), 'missing: stage1.1.rbr_1x1.bn.bias'), (changed(state, extra=torch.zeros(2)), 'unexpected: extra'):
        with pytest.raises(ValueError, match='nearest is repvgg_a0_tiny') as e: from_official(bad)
        assert words in str(e.value)
    for odd in {'linear.weight': torch.tensor(3.)}, {'linear.weight': torch.zeros(0, 8)}, {'stage0.rbr_dense.conv.weight': torch.zeros(8, 0, 3, 3), 'linear.weight': torch.zeros(3, 8)}:
        with pytest.raises(ValueError, match='no network known'): from_official(odd)

def test_orepa_constants_of_the_full_network():
    "The authors' prior, by Python's own cosine: wide layers have high frequencies"
    import math
    state = to_official(create_model('orepa_resnet18'))
    prior = lambda c: torch.tensor([[[math.cos(math.pi*(h + .5)*(n + 1)/3) if n < c/2 else math.cos(math.pi*(w + .5)*(n + 1 - c/2)/3) for w in range(3)] for h in range(3)] for n in range(c)])
    for k, v in state.items():
        if k.endswith('prior'): close(v, prior(len(v)), 1e-6, k)

def test_large_kernels_deployed():
    conv = nn.Conv2d(4, 4, 5, padding=2)
    w = {'or_large_reparam.weight': torch.randn(4, 4, 5, 5), 'or_large_reparam.bias': torch.randn(4)}
    assert torch.equal(load_official(conv, w).weight, w['or_large_reparam.weight'])

def test_a_bias_of_ones_own_has_no_place():
    with pytest.raises(ValueError, match='bias'): to_official(OREPA(4, 4, bias=True))
    with pytest.raises(ValueError, match='layout'): to_official(RepVGGBlock(4, 4), 'orepa')

def test_wrappings():
    state = to_official(A0())
    for wrapped in {'model': state, 'epoch': 3}, {'state_dict': {f'module.{k}': v for k, v in state.items()}, 'optimizer': {'lr': 1.}}, {f'module.module.{k}': v for k, v in state.items()}: assert unwrap(wrapped).keys() == state.keys()

def before(prefix, state): return {f'{prefix}{k}': v for k, v in state.items()}

def test_nested_wrappings():
    "Every pair of a dictionary and of prefixes, and counters beside"
    m = A0(); state = to_official(m)
    keys = 'module. _orig_mod. model. net. module._orig_mod.model. model.module. ema.module. ema_model. averaged_model. student. network. module.module. _fsdp_wrapped_module. model._orig_mod.'.split()
    dicts = (lambda s: s, lambda s: dict(model=s, optimizer=dict(state={}), epoch=3), lambda s: dict(state_dict=s, hyper_parameters=dict(lr=.1)), lambda s: dict(ema=s, updates=7), lambda s: dict(model_state_dict=dict(module=s)), lambda s: dict(shadow=s, decay=.999))
    for p in ('', *keys):
        for wrap in dicts: assert unwrap(wrap(before(p, state))).keys() == state.keys(), p
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 1))), use_buffers=True).state_dict()
    assert set(unwrap(averaged)) == {'0.weight', '0.bias'}
    assert set(unwrap(dict(state_dict={**before('model.', state), 'criterion.weight': torch.ones(10), 'metric.total': torch.ones(())}))) == set(state)
    inner = {k.replace('stage1.', 'stage1._orig_mod.'): v for k, v in state.items()}
    load_official(fresh := A0(), dict(model=before('module.', inner)))
    same_state(fresh.state_dict(), m.state_dict())

@pytest.mark.parametrize('wrap', [lambda a, b: dict(ema=a, state_dict=b), lambda a, b: dict(state_dict=b, state_dict_ema=a), lambda a, b: dict(params=b, params_ema=a), lambda a, b: dict(model=b, model_ema=dict(module=a)),
                                  lambda a, b: {**before('model.', b), **before('model_ema.', a)}, lambda a, b: {**before('online_model.', b), **before('ema_model.', a), 'step': torch.tensor(5), 'initted': torch.tensor(True)}])
def test_averages_are_taken_and_it_is_said(wrap):
    average, other = to_official(randomize(A0())), to_official(A0())
    with pytest.warns(UserWarning, match='the average is taken'): got = unwrap(wrap(average, other))
    same_state(got, average)

def test_two_networks_are_for_the_reader_to_choose():
    state = to_official(A0())
    for both in dict(teacher=state, student=state), before('teacher.', state) | before('student.', state), dict(ema=state, swa_model=state), dict(state_dict=before('student.', state) | before('teacher.', state)):
        with pytest.raises(ValueError, match='several networks') as e: unwrap(both)
        assert 'teacher' in str(e.value) or 'swa_model' in str(e.value)
    with pytest.raises(ValueError, match="give checkpoint.'generator'"): unwrap(dict(generator=state, epoch=1))
    assert set(unwrap(before('backbone.', state) | before('model.', state))) == set(before('backbone.', state) | before('model.', state)) # what is not understood stays

def test_half_precision_checkpoints():
    m = A0()
    load_official(m, {k: v.half() if v.is_floating_point() else v for k, v in to_official(A0()).items()})
    assert {p.dtype for p in m.parameters()} == {torch.float32}

class Evil:
    ran = False
    def __reduce__(self): return (setattr, (Evil, 'ran', True))

def test_files(tmp_path):
    m = A0()
    for name in 'a.pth', 'a.safetensors':
        write_checkpoint(tmp_path/name, to_official(m))
        same_state(read_checkpoint(tmp_path/name), to_official(m))
    (tmp_path/'evil.pth').write_bytes(pickle.dumps({'state_dict': Evil()}))
    torch.save(m, tmp_path/'module.pth'); (tmp_path/'text.safetensors').write_text('no'); (tmp_path/'cut.pth').write_bytes((tmp_path/'a.pth').read_bytes()[:500])
    for name in 'evil.pth', 'module.pth', 'text.safetensors', 'cut.pth':
        with pytest.raises(ValueError, match=name): read_checkpoint(tmp_path/name)
    assert not Evil.ran
    with pytest.raises(FileNotFoundError, match='nothing.pth'): read_checkpoint(tmp_path/'nothing.pth')
    with pytest.raises(ValueError, match='.safetensors'): write_checkpoint(tmp_path/'a.bin', {})
    with pytest.raises(FileNotFoundError, match='no folder'): write_checkpoint(tmp_path/'no'/'a.pth', {})
    assert not list(tmp_path.glob('*.tmp'))

@pytest.mark.parametrize('name', ['mobileone_s0_tiny', 'orepa_resnet18_tiny', 'ecbsr_m4c8'])
def test_convert_round_trip(name, tmp_path):
    m = randomize(create_model(name)).eval()
    write_checkpoint(tmp_path/'theirs.pth', to_official(m))
    convert(tmp_path/'theirs.pth', tmp_path/'ours.safetensors')
    convert(tmp_path/'ours.safetensors', tmp_path/'back.pth', 'authors', model=name)
    same_state(read_checkpoint(tmp_path/'back.pth'), to_official(m))
    convert(tmp_path/'theirs.pth', tmp_path/'deployed.pth', 'authors', deployed=True)
    x = torch.rand(2, 1 if 'ecb' in name else 3, 16, 16)
    back, origin = from_official(read_checkpoint(tmp_path/'deployed.pth'))
    assert origin.deployed
    with torch.no_grad(): close(back(x), m(x), 1e-4)
    for args, error in (('theirs.pth', 'ours.safetensors'), FileExistsError), (('ours.safetensors', 'x.pth'), ValueError), (('theirs.pth', 'x.pth', 'keras'), ValueError):
        with pytest.raises(error): convert(tmp_path/args[0], tmp_path/args[1], *args[2:])
    convert(tmp_path/'theirs.pth', tmp_path/'ours-deployed.pth', deployed=True) # repq's own merged form is read as well
    convert(tmp_path/'ours-deployed.pth', tmp_path/'again.pth', 'authors', model=name)
    same_state(read_checkpoint(tmp_path/'again.pth'), read_checkpoint(tmp_path/'deployed.pth'))
    with pytest.raises(ValueError, match='not repvgg_b0'): convert(tmp_path/'theirs.pth', tmp_path/'x.pth', model='repvgg_b0')
    with pytest.raises(ValueError, match='is not of'): convert(tmp_path/'ours.safetensors', tmp_path/'x.pth', model='repvgg_a0_tiny')
    assert not (tmp_path/'x.pth').exists()

def test_a_checkpoint_that_holds_itself(tmp_path):
    state = {}; state['state_dict'] = {'model': state}
    with pytest.raises(ValueError, match='holds itself'): unwrap(state)
    torch.save(state, tmp_path/'a.pth')
    with pytest.raises(ValueError, match='holds itself'): convert(tmp_path/'a.pth', tmp_path/'b.safetensors')
