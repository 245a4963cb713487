"Bad input: one clear line that names the value, nothing changed."
import os, subprocess, sys, warnings
import pytest, torch
from torch import nn
from helpers import same_state, states
from repq.batchnorm import get_statistics
from repq.blocks import ACBlock, Block, DiverseBranchBlock, MobileOneBlock, RepSRBlock, RepVGGBlock
from repq.ecb import ECB
from repq.orepa import OREPA, OREPA1x1, OREPALargeKernel
from repq.kernels import Geometry, Kernel, impulse_response
from repq.layers import RepQLayer
from repq.quantizers import LSQ, fake_quantize, grid, min_error_step
import repq
from repq.surgery import adapt_statistics, calibrate, deploy, merge, param_groups, quantize, reparametrize

quiet = dict(verbose=False)
conv, bn, seq = nn.Conv2d, nn.BatchNorm2d, nn.Sequential
IMAGES = torch.ones(2, 3, 8, 8)
def model(): return seq(conv(3, 4, 3), bn(4), nn.ReLU(), conv(4, 2, 3))
def started(*a, **kw): m = quantize(model(), *a, **quiet, **kw); m(torch.randn(2, 3, 8, 8)); return m
def fake(step, v=torch.zeros(3, 2)): return fake_quantize(v, step, -8, 7)

# what: (call, words that the one line must have)
CASES = {
    'padding same':             (lambda: RepVGGBlock(2, 2, padding='same'), 'same', 'padding'),
    'half a pixel':             (lambda: Geometry(padding=1.5), 'padding', '1.5'),
    'other channels, estimated': (lambda: RepQLayer(RepVGGBlock(4, 4), statistics='estimated').train()(torch.randn(2, 3, 6, 6)), '3', '4', 'channels'),
    'bits too many':            (lambda: quantize(model(), 17, 4), '17', '2 to 16'),
    'bits too few':             (lambda: quantize(model(), 4, 1), '1', '2 to 16'),
    'bits not whole':           (lambda: quantize(model(), 4., 4), '4.0'),
    'bits in words':            (lambda: LSQ('4'), "'4'"),
    'bits of the edges':        (lambda: quantize(model(), 4, 4, first_last_bits=32), '32'),
    'grid':                     (lambda: grid(1, True), '1'),
    'no channels in the middle': (lambda: DiverseBranchBlock(4, 4, internal_channels=-1), 'DiverseBranchBlock', 'internal_channels=-1'),
    'uneven channels':          (lambda: OREPA(4, 4, expand=1.5), 'OREPA', 'expand=1.5'),
    'no channels':              (lambda: RepSRBlock(4, 4, expand=0), 'RepSRBlock', 'expand=0'),
    'a multiplier in words':    (lambda: ECB(4, 4, depth_multiplier='2'), 'ECB', "'2'"),
    'copies':                   (lambda: MobileOneBlock(4, 4, num_conv_branches=0), 'MobileOneBlock', '0'),
    'a chain of even size':     (lambda: OREPALargeKernel(4, 4, 4), 'OREPALargeKernel', 'kernel_size=4'),
    'a 1×1 that is none':       (lambda: OREPA1x1(4, 4, 3), 'OREPA1x1', 'kernel_size=3'),
    'a switch in words':        (lambda: quantize(model(), 4, 4, per_channel='no'), 'per_channel', "'no'"),
    'a switch for an option':   (lambda: quantize(model(), 4, 4, adopt='timm'), 'adopt', "'timm'"),
    'unknown statistics':       (lambda: quantize(model(), 4, 4, statistics='exakt'), 'exakt', 'estimated'),
    'unknown statistics, layer': (lambda: RepQLayer(conv(3, 4, 3), statistics='mean'), 'mean', 'sampled'),
    'nothing to quantize':      (lambda: quantize(seq(nn.ReLU()), 4, 4), 'Sequential', 'Conv2d'),
    'deploy before a batch':    (lambda: deploy(quantize(model(), 4, 4, **quiet)), "'0'", 'batch'),
    'layer before a batch':     (lambda: RepQLayer(conv(3, 4, 3), LSQ(4)).deploy(), 'batch'),
    'yields no kernel':         (lambda: RepQLayer(nn.ReLU()), 'ReLU'),
    'unknown init':             (lambda: reparametrize(model(), init='zero'), 'zero', 'preserve'),
    'no batches':               (lambda: calibrate(started(4, 4), []), 'batch'),
    'nan in the first batch':   (lambda: quantize(model(), 4, 4, **quiet)(torch.full((1, 3, 8, 8), torch.nan)), 'nan'),
    'integers as input':        (lambda: quantize(model(), 4, 4, **quiet)(torch.ones(1, 3, 8, 8, dtype=torch.uint8)), 'uint8'),
    'empty first batch':        (lambda: quantize(model(), 4, 4, **quiet)(torch.ones(0, 3, 8, 8)), 'empty'),
    'step of another shape':    (lambda: fake(torch.ones(4)), '(4,)'),
    'step is no tensor':        (lambda: fake(.1), 'float'),
    'step of nothing':          (lambda: min_error_step(torch.zeros(0), -8, 7), 'empty'),
    'grid without zero':        (lambda: min_error_step(torch.ones(3), 1, 7), 'qn=1'),
    'step before a tensor':     (lambda: LSQ(4).step, 'step'),
    'negative step':            (lambda: LSQ(4).set_step(-1.), '-1'),
    'channels without use':     (lambda: LSQ(4, channels=3), '3', 'per_channel'),
    'nonlinearity in a block':  (lambda: Block([seq(conv(2, 2, 3), nn.ReLU())]), 'ReLU', 'outside'),
    'pooling by maximum':       (lambda: Block([seq(conv(2, 2, 3), nn.MaxPool2d(3))]), 'MaxPool2d'),
    'transposed convolution':   (lambda: Block([nn.ConvTranspose2d(2, 2, 3)]), 'ConvTranspose2d'),
    'a function as a branch':   (lambda: Block([torch.relu]), 'Block'),
    'no branches':              (lambda: Block([]), 'branch'),
    'strides differ':           (lambda: Block([conv(2, 2, 3, 2), conv(2, 2, 1)], padding=None), 'stride', '(2, 2)'),
    'stride in the middle':     (lambda: Block([seq(conv(2, 2, 1, 2), conv(2, 2, 3))]), 'stride'),
    'padding modes differ':     (lambda: Block([conv(2, 2, 3, padding=1, padding_mode='reflect'), conv(2, 2, 3, padding=1, padding_mode='circular')]), 'reflect', 'circular'),
    'branches not aligned':     (lambda: Block([conv(2, 2, 3), conv(2, 2, 1)]), 'aligned', '(1, 1)'),
    'padding said twice':       (lambda: Block([conv(2, 2, 3, padding=1)], padding=1), 'padding'),
    'no centre':                (lambda: Block([conv(2, 2, 2), conv(2, 2, 1)]), 'centred'),
    'an even kernel':           (lambda: RepVGGBlock(2, 2, 2), 'centred'),
    'outputs differ':           (lambda: Block([conv(2, 2, 1), conv(2, 4, 1)]), '[2, 4]'),
    'identity of another width': (lambda: Block([conv(2, 4, 1), nn.Identity()]), 'identity', '2', '4'),
    'rounded pooling':          (lambda: Block([seq(conv(2, 2, 1), nn.AvgPool2d(3, 2, ceil_mode=True))]), 'ceil_mode'),
    'groups':                   (lambda: RepVGGBlock(3, 4, groups=2), 'groups'),
    'padding mode':             (lambda: ACBlock(3, 4, padding_mode='mirror'), 'mirror', 'reflect'),
    'three paddings':           (lambda: RepVGGBlock(3, 4, padding=(1, 1, 1)), '(1, 1, 1)'),
    'kernel that has no place': (lambda: Block([seq(conv(2, 4, 1), conv(4, 2, 3))]).load_kernel(Kernel(torch.zeros(2, 2, 3, 3))), 'branch'),
    'no running statistics':    (lambda: merge(seq(Block([seq(conv(2, 2, 1), bn(2, track_running_stats=False))]))), 'track_running_stats'),
    'weight of three dimensions': (lambda: Kernel(torch.zeros(2, 2, 3)), '(2, 2, 3)'),
    'bias of another length':   (lambda: Kernel(torch.zeros(2, 2, 3, 3), torch.zeros(3)), '(3,)'),
    'kernels of other channels': (lambda: Kernel(torch.zeros(2, 2, 3, 3)) + Kernel(torch.zeros(4, 2, 3, 3)), '2→2', '2→4'),
    'sequence of other channels': (lambda: Kernel(torch.zeros(2, 2, 3, 3)).then(Kernel(torch.zeros(4, 3, 3, 3))), '3→4'),
    'smaller than it is':       (lambda: Kernel(torch.zeros(2, 2, 3, 3)).pad(1), '3×3', '1×1'),
    'off centre':               (lambda: Kernel(torch.zeros(2, 2, 3, 3)).pad(4), '3×3', '4×4'),
    'groups of a kernel':       (lambda: Kernel(torch.zeros(3, 2, 3, 3), groups=2), '3', '2'),
    'finer groups':             (lambda: Kernel(torch.zeros(4, 2, 3, 3), groups=2).coarsen(4), '2', '4'),
    'asymmetric same':          (lambda: Geometry.of(conv(2, 2, 2, padding='same')), 'same'),
    'measured: nonlinear':      (lambda: impulse_response(seq(conv(3, 3, 3), nn.ReLU()), 3, 3, padding=0), 'Sequential', 'nonlinear'),
    'measured: larger':         (lambda: impulse_response(conv(3, 3, 5, padding=2), 3, 3), '3×3'),
    'measured: strided':        (lambda: impulse_response(conv(3, 3, 3, 2, 1), 3, 3), 'Conv2d'),
    'measured: dilated':        (lambda: impulse_response(conv(3, 3, 3, padding=2, dilation=2), 3, 3, padding=2), 'Conv2d'),
    'not a model':              (lambda: quantize('resnet18', 4, 4), 'resnet18'),
    'not a model to change':    (lambda: reparametrize('resnet18'), 'resnet18'),
    'block by its name':        (lambda: reparametrize(model(), block='RepVGGBlock'), 'RepVGGBlock'),
    'block that is none':       (lambda: reparametrize(model(), block=conv), 'Conv2d'),
    'one module for branches':  (lambda: Block(conv(2, 2, 1)), 'Conv2d', 'branches'),
    'channels inside a branch': (lambda: Block([seq(conv(2, 4, 1), conv(3, 2, 3))]), '4', '3'),
    'batch norm of other width': (lambda: Block([seq(conv(2, 4, 1), bn(3))]), '4', '3'),
    'batch norm of sequences':  (lambda: Block([seq(conv(2, 4, 1), nn.BatchNorm1d(4))]), 'BatchNorm1d'),
    'stride zero':              (lambda: Geometry(stride=0), 'stride', '0'),
    'dilation zero':            (lambda: Geometry(dilation=0), 'dilation', '0'),
    'measured groups':          (lambda: impulse_response(conv(3, 3, 3, padding=1), 3, 3, groups=2), 'groups', '2'),
    'a sum with a tensor':      (lambda: Kernel(torch.zeros(2, 2, 3, 3)) + torch.zeros(2, 2, 3, 3), 'Kernel'),
    'a tensor for batches':     (lambda: adapt_statistics(seq(RepVGGBlock(3, 3)), torch.randn(2, 3, 5, 5)), 'batches'),
    'no batches to adapt to':   (lambda: adapt_statistics(seq(RepVGGBlock(3, 3)), []), 'batch'),
    'nan in a later batch':     (lambda: calibrate(quantize(model(), 4, 4, **quiet), [IMAGES, IMAGES*torch.nan]), "'1'", 'not finite'),
    'nan to adapt to':          (lambda: adapt_statistics(seq(RepVGGBlock(3, 3)), [IMAGES, IMAGES*torch.nan]), "'0'", 'not finite'),
    'a decay that is none':     (lambda: param_groups(model(), float('nan')), 'weight_decay', 'nan'),
    'a decay below zero':       (lambda: param_groups(model(), -1), 'weight_decay', '-1'),
    'groups of no model':       (lambda: param_groups(None, .1), 'None'),
    'bits by a number':         (lambda: quantize(model(), layer_bits={0: 4}), 'no layer 0 '),
    'a block that is made':     (lambda: reparametrize(model(), RepVGGBlock(3, 4)), 'a RepVGGBlock'),
    'the cost of no model':     (lambda: repq.cost('fp', IMAGES), "'fp'"),
    'integers of no model':     (lambda: repq.check_integers(None), 'None'),
    'authors of no model':      (lambda: repq.to_official({}), '{}'),
    'images that are none':     (lambda: repq.to_integer(started(4, 4), 'images'), "'images'"),
    'a checkpoint of nothing':  (lambda: repq.write_checkpoint('x.pth', None), 'None'),
    'a checkpoint of words':    (lambda: repq.write_checkpoint('x.safetensors', {'a': 'b'}), "'a'", "'b'"),
    'a checkpoint without values': (lambda: repq.write_checkpoint('x.pth', {'a': torch.ones(2, device='meta')}), 'a', 'meta'),
    'a map below the kernel':   (lambda: get_statistics('corrected')(torch.randn(1, 2, 2, 2), Kernel(torch.zeros(2, 2, 5, 5))), '5', '2'),
}

def one_line(e, *words):
    text = str(e)
    assert '\n' not in text and 10 < len(text) < 400, text
    for w in words: assert w in text, f'{w!r} is not in: {text}'

@pytest.mark.parametrize('what', CASES)
def test_one_clear_line(what):
    call, *words = CASES[what]
    with pytest.raises((ValueError, TypeError, RuntimeError) if what == 'step before a tensor' else (ValueError, TypeError)) as e: call()
    one_line(e.value, *words)

# A failed call leaves its argument as it was

@pytest.mark.parametrize('call', [lambda m: quantize(m, 17, 4, inplace=True), lambda m: quantize(m, 4, 4, statistics='?', inplace=True), lambda m: reparametrize(m, init='?', inplace=True)])
def test_nothing_changed(call):
    m = model(); before, text = states(m), repr(m)
    with pytest.raises(ValueError): call(m)
    same_state(states(m), before); assert repr(m) == text

@pytest.mark.parametrize('f,make', [(adapt_statistics, lambda: seq(RepVGGBlock(3, 3), RepVGGBlock(3, 3))), (calibrate, model)])
def test_statistics_that_are_not_finite_spoil_nothing(f, make):
    m = make(); before = states(m)
    with pytest.raises(ValueError, match='not finite'): f(m, [IMAGES, IMAGES*torch.nan])
    same_state(states(m), before)

def test_a_batch_norm_of_negative_variance_is_left(capsys):
    m = model(); m[1].running_var.fill_(-1)
    assert type(reparametrize(m)[0]) is conv and 'not finite' in capsys.readouterr().out

def test_quantize_in_place_all_or_nothing(capsys):
    m = seq(conv(3, 4, 3), conv(4, 4, 2, padding='same')); text, even = repr(m), m[1]
    for kw in dict(layer_bits={'0': 40}), dict(layer_bits={'9': 4}), dict(statistics='none'):
        with pytest.raises(ValueError): quantize(m, 4, 4, inplace=True, **kw, **quiet)
        assert repr(m) == text
    quantize(m, 4, 4, inplace=True)                     # one layer that cannot be quantized is left and named, the other is
    assert m[1] is even and type(m[0]).__name__ == 'RepQLayer' and "left: 1 (padding='same' is asymmetric" in capsys.readouterr().out

def test_deploy_in_place_all_or_nothing():
    m = quantize(model(), 4, 4, **quiet); m[0](torch.randn(2, 3, 8, 8)); text = repr(m)
    with pytest.raises(ValueError): deploy(m, inplace=True, **quiet)
    assert repr(m) == text

def test_adapt_all_or_nothing():
    m = seq(Block([seq(conv(3, 3, 3), bn(3)), seq(conv(3, 3, 3), bn(3, affine=False))])); before = states(m)
    with pytest.raises(ValueError, match='affine'): adapt_statistics(m, [torch.randn(2, 3, 5, 5)])
    same_state(states(m), before)

def test_load_kernel_all_or_nothing():
    block = Block([conv(2, 2, 3, bias=False)]); before = states(block)
    with pytest.raises(ValueError, match='bias'): block.load_kernel(Kernel(torch.ones(2, 2, 3, 3), torch.ones(2)))
    same_state(states(block), before)

@pytest.mark.parametrize('other,words', [
    (lambda: started(4, 4, per_channel=False), ('0.weight_quantizer', '(4,)')),
    (lambda: started(2, 2, first_last_bits=None), ('0.weight_quantizer', '-8..7', '-2..1')),
    (lambda: quantize(seq(ACBlock(3, 4, padding=0), nn.Identity(), nn.ReLU(), conv(4, 2, 3)), 4, 4, **quiet), ('Missing', '0.block.branches')),
])
def test_checkpoint_of_another_model(other, words):
    state = started(4, 4, first_last_bits=None).state_dict()
    m = other()
    with pytest.raises(RuntimeError) as e: m.load_state_dict(state)
    for w in words: assert w in str(e.value), str(e.value)

def test_reports_say_what_was_left(capsys):
    "Even kernels cannot become a RepVGG block; the report names them"
    reparametrize(seq(conv(3, 4, 3), conv(4, 4, 2)))
    out = capsys.readouterr().out
    assert '1 convolution' in out and 'left: 1' in out and 'centred' in out

def test_reports_name_what_stays_float(capsys):
    quantize(seq(conv(3, 4, 3), nn.ConvTranspose2d(4, 4, 2, 2, dilation=2), conv(4, 2, 1)), 4, 4)
    assert 'ConvTranspose2d' in capsys.readouterr().out

def test_torchrun_reports_the_line(tmp_path):
    "In the file that torchrun reads when a process has failed"
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    file = tmp_path/'error.json'
    p = subprocess.run([sys.executable, '-m', 'repq.cli', 'train', 'repvgg_a0_tyny', '--out', tmp_path/'x'], capture_output=True, text=True, env={**os.environ, 'TORCHELASTIC_ERROR_FILE': str(file)})
    line = p.stderr.splitlines()[-1]
    assert p.returncode == 1 and line.startswith('repq: ') and 'repvgg_a0_tyny' in line
    assert ProcessFailure(0, 1, 1, str(file)).message['message'] == line

def test_an_error_in_calibration_names_the_layer():
    model = quantize(seq(conv(3, 4, 3), nn.ReLU(), conv(4, 2, 1)), 4, 4, verbose=False)
    for bad in float('nan'), float('inf'):
        with pytest.raises(ValueError, match="'0.input_quantizer': cannot find a step for non-finite values"): calibrate(model, [torch.full((2, 3, 8, 8), bad)])
    with torch.no_grad():
        for p in model[2].block.parameters(): p.fill_(float('nan'))
    with pytest.raises(ValueError, match="'2.weight_quantizer': cannot find a step"): calibrate(model, [torch.randn(2, 3, 8, 8)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

# What commands load, and what they say

def test_list_and_help_load_no_torch():
    code = "import sys; sys.argv = ['repq', *{args}]\nfrom repq.cli import main\ntry: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'repq.networks.registry' in sys.modules or {args} != ['list']\nassert 'torch' not in sys.modules"
    for args in ['list'], ['--help'], ['train', '--help'], ['bench', '-h']:
        p = subprocess.run([sys.executable, '-c', code.format(args=args)], capture_output=True, text=True)
        assert p.returncode == 0 and p.stdout and not p.stderr, p.stderr

def test_help_is_whole():
    from typer.testing import CliRunner
    from repq.cli import app
    for args in (), ('bench',):
        text = CliRunner().invoke(app, [*args, '--help']).output
        assert '…' not in text and '...' not in text[text.index('Commands:'):]

def test_list_has_columns():
    from typer.testing import CliRunner
    from repq.cli import app
    from repq.models import image_size, list_models
    lines = CliRunner().invoke(app, ['list']).output.splitlines()
    for n in list_models(): assert [l.split() for l in lines if l.split()[:1] == [n]] == [[n, str(image_size(n)), 'px']]

def test_any_name_can_be_shown(monkeypatch):
    "Names of other bytes than UTF-8, in terminals of ASCII: a command that did all that it should does not fail in saying so"
    import io
    from repq.commands import app
    out = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(out, encoding='ascii')); monkeypatch.setattr(app, 'keep_freed_memory', lambda: False)
    with warnings.catch_warnings(): app.settle()
    print('a\udcff → ü', flush=True)
    assert out.getvalue() == rb'a\udcff \u2192 \xfc' + b'\n'
    assert app.error_line(ValueError('runs/a\nb\x1b[2J\udcff exists')) == r'runs/a b\x1b[2J\udcff exists'
    assert app.error_line(FileNotFoundError(2, 'gone', 'a\nb')) == 'a b cannot be used (gone)'

def test_no_warning_of_libraries(tmp_path):
    "Of a real command, in a process of its own with Python's own filters"
    p = subprocess.run([sys.executable, '-m', 'repq.cli', 'train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--epochs', '2', '--batch-size', '240', '--timing', '0', '--out', tmp_path/'x'], capture_output=True, text=True)
    assert p.returncode == 0 and not p.stderr, p.stderr
    head, *epochs = p.stdout.splitlines()[:3]
    assert head.split() == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'] and [len(l) for l in epochs] == [len(head)]*2
    assert [l.split()[0] for l in epochs] == ['0', '1'] and all(float(v) for l in epochs for v in l.split()[1:4])

