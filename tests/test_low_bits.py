"At 4 bits and fewer: grids without zero, and what recipes switch on."
import pytest, torch
from torch import nn
from typer.testing import CliRunner
from repq.blocks import RepVGGBlock
from repq.cli import app
from repq.export import onnx_session, run_onnx, to_onnx
from repq.integers import load_integers, save_integers
from repq.method.grids import fake_quantize, grid, quantize_to_int
from repq.method.minerror import min_error_step
from repq.method.peeled import PeeledLSQ, own_taps
from repq.models import list_models, task
from repq.quantizers import LSQ
from repq.recipes import build, get_recipe, low_bit_switches
from repq.deployed import load_deployed, save_deployed
from repq.networks.costs import cost
from repq.method.layers import IntegerKernel
from repq.surgery import adapt_statistics, calibrate, deploy, quantize

@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('per_channel', [False, True])
def test_the_step_is_the_best_of_all_tried(bits, per_channel):
    "Sorted sums and direct ones choose alike, on a grid that no integer is on"
    w, ends = torch.randn(8, 2000, dtype=torch.float64), grid(bits, True, centred=True)
    s = min_error_step(w, *ends, per_channel=per_channel)
    def error(step): return (w - fake_quantize(w, step, *ends)).square().sum(1)
    best = error(s)
    for factor in (.9, .97, 1.03, 1.1):
        other = error(s*factor)
        assert (other >= best*(1 - 1e-9)).all() if per_channel else other.sum() >= best.sum()*(1 - 1e-9)

def test_zero_is_no_value():
    v = torch.linspace(-3, 3, 101)
    q = fake_quantize(v, torch.tensor(.7), *grid(2, True, centred=True))
    assert sorted(set((q/.7).round(decimals=3).tolist())) == [-1.5, -.5, .5, 1.5]
    assert set(quantize_to_int(v, torch.tensor(.7), *grid(2, True, centred=True)).tolist()) == {-3, -1, 1, 3}

def test_what_cannot_be_centred():
    with pytest.raises(ValueError, match='signed must be True'): LSQ(2, signed=False, centred=True)
    with pytest.raises(ValueError, match='signed must be True'): LSQ(2, signed=None, centred=True)

def test_a_checkpoint_of_the_other_grid_is_refused():
    a, b = LSQ(2, centred=True), LSQ(2)
    for q in a, b: q(torch.randn(9, 9))
    with pytest.raises(RuntimeError, match='quantizes to -1.5..1.5, this quantizer to -2..1'): b.load_state_dict(a.state_dict())
    with pytest.raises(RuntimeError, match='quantizes to -2..1, this quantizer to -1.5..1.5'): a.load_state_dict(b.state_dict())
    c = LSQ(2, centred=True)
    c.load_state_dict(a.state_dict())
    assert torch.equal(c.eval()(torch.ones(3)), a.eval()(torch.ones(3)))

def same_in_every_file(q, d, x, folder):
    "A quantized network and its deployed form: files compute what they compute"
    ref = to_onnx(q, folder/'net.onnx', x)
    assert torch.equal(run_onnx(onnx_session(folder/'net.onnx'), x), ref(x))
    save_integers(ref, folder/'ints.safetensors')
    assert torch.equal(load_integers(folder/'ints.safetensors')(x), ref(x))
    save_deployed(q, folder/'net.safetensors', verbose=False)
    with torch.no_grad(): assert torch.equal(load_deployed(folder/'net.safetensors')(x), d(x))

@pytest.mark.parametrize('bits', [2, 3, 4])
def test_from_training_to_files(bits, tmp_path):
    "Odd integers, in every form the same numbers"
    net = nn.Sequential(RepVGGBlock(3, 8), nn.ReLU(), RepVGGBlock(8, 8), nn.ReLU(), RepVGGBlock(8, 4), nn.ReLU())
    x = torch.randn(16, 3, 8, 8)
    q = calibrate(quantize(net, bits, bits, first_last_bits=None, centred=True, verbose=False), [x]).eval()
    d = deploy(q, verbose=False)
    with torch.no_grad(): assert torch.equal(q(x), d(x))
    ints = [m.block.integers for m in d.modules() if hasattr(m, 'block')]
    assert len(ints) == 3 and all((i % 2 == 1).all() and i.abs().max() <= 2**bits - 1 for i in ints)
    same_in_every_file(q, d, x, tmp_path)

def identities(channels=8):
    "A network whose kernels have an identity each, twelve times as large as what else is in them"
    net = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), RepVGGBlock(channels, channels), nn.ReLU(),
                        RepVGGBlock(channels, channels, groups=channels), nn.ReLU(), nn.Conv2d(channels, 4, 3)).eval()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, RepVGGBlock): m.branches['dense'].conv.weight.mul_(.3); m.branches['point'].conv.weight.mul_(.1)
    return net

@pytest.mark.parametrize('centred', [True, False])
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_peeled_from_training_to_files(bits, centred, tmp_path):
    "The identity's tap goes beyond the grid, in every form the same numbers, and costs agree"
    torch.manual_seed(0)
    x = torch.rand(16, 3, 8, 8)
    q = quantize(identities(), bits, bits, first_last_bits=None, centred=centred, peel=True, verbose=False)
    kinds = [type(m.weight_quantizer) for m in q.modules() if hasattr(m, 'weight_quantizer')]
    assert kinds == [LSQ, PeeledLSQ, PeeledLSQ, LSQ]
    q = calibrate(q, [x]).train()
    q(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in q.parameters())
    d = deploy(q.eval(), verbose=False)
    with torch.no_grad(): assert torch.equal(q(x), d(x))
    for m in [m.block for m in d.modules() if hasattr(m, 'block')][1:3]:
        taps, half = own_taps(m.integers), 2**(bits - 1)*(2 if centred else 1)
        assert m.bits <= 7 and -half <= m.integers[~taps].min() and m.integers[~taps].max() < half
        assert m.integers[taps].abs().max() >= half # beyond the end
    same_in_every_file(q, d, x, tmp_path)
    assert cost(q, x)['size_bytes'] == cost(d, x)['size_bytes']

def test_peeled_and_whole_do_not_mix():
    build_ = lambda **kw: quantize(identities(), 2, 2, centred=True, verbose=False, **kw)
    a, b = calibrate(build_(peel=True), [torch.rand(4, 3, 8, 8)]), build_()
    with pytest.raises(RuntimeError, match='taps_range'): b.load_state_dict(a.state_dict())
    with pytest.raises(RuntimeError, match='taps_range'): a.load_state_dict(b.state_dict())
    with pytest.raises(ValueError, match='integers from -64 to 63 are not of 6 bits'):
        IntegerKernel(nn.Conv2d(1, 1, 1).requires_grad_(False), torch.tensor([-64, 63]), torch.ones(1), bits=6)

def test_statistics_of_a_quantized_network_are_of_quantized_inputs():
    "`adapt_statistics` after `calibrate`: evaluation stays what it was, and training begins there"
    torch.manual_seed(0)
    x = torch.rand(64, 3, 8, 8)
    for noise in False, True:
        q = calibrate(quantize(identities(), 3, 2, first_last_bits=None, input_noise=noise, verbose=False), [x])
        with torch.no_grad():
            want = q(x)
            adapt_statistics(q, [x])
            assert (q(x) - want).abs().max() < 1e-4*want.std()
            assert (q.train()(x) - want).abs().max() < 1e-3*want.std()

TINY = [n for n in list_models('*_tiny') if task(n) == 'classification' and 'plain' not in n and not n.startswith('resnet')]

@pytest.mark.parametrize('bits', [4, 2])
@pytest.mark.parametrize('name', TINY)
def test_default_recipes_train(name, bits):
    "Losses and gradients stay finite, and the loss falls"
    torch.manual_seed(0)
    recipe = get_recipe(name, 'repq' if name.startswith('orepa') else 'repq-bn', bits)
    model = build(recipe, 4, 1, build(get_recipe(name, recipe.method), 4, 1).state_dict()).train()
    y = torch.arange(64) % 4
    x = torch.randn(64, 1, 8, 8)*.3 + y.view(-1, 1, 1, 1)*torch.linspace(-1, 1, 64).view(8, 8)
    opt, losses = torch.optim.SGD(model.parameters(), recipe.lr, momentum=.9), []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        opt.zero_grad(); loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        opt.step(); losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5]) and max(losses) < 20, losses

def test_a_norm_after_each_layer_needs_no_smaller_rate():
    "A tenth of the rate is for depthwise layers without one; with it MobileOne ended 15 points lower at 2 bits (digits)"
    rate = lambda model, bits, **kw: get_recipe(model, 'repq-bnest', bits, **kw).lr
    for bits in 4, 2: assert rate('mobileone_s0_tiny', bits) == rate('repvgg_a0_tiny', bits)
    assert rate('mobileone_s0_tiny', 4, as_published=True) < rate('repvgg_a0_tiny', 4, as_published=True)

def test_what_each_recipe_adds():
    "Blocks at 4 bits and fewer, plain networks bounded steps below 4, super-resolution nothing"
    added = {(m, b): set(low_bit_switches('repvgg_a0_tiny', m, b)) for m in ('plain', 'merged', 'repq-bnest') for b in (8, 5, 4, 3, 2)}
    grids = {'norm_after', 'bound_steps', 'centred', 'peel'}
    for b in 8, 5: assert not any(added[m, b] for m in ('plain', 'merged', 'repq-bnest'))
    for b in 4, 3, 2:
        assert added['merged', b] == grids and added['repq-bnest', b] == grids | {'input_noise', 'reestimate'}
        assert added['plain', b] == (set() if b == 4 else {'bound_steps'})
        assert not low_bit_switches('ecbsr_m4c8', 'repq', b)

def test_the_command_line_says_what_it_adds(tmp_path):
    run = lambda *a: CliRunner().invoke(app, ['train', 'repvgg_a0_tiny', '--out', str(tmp_path/'x'), '--dry-run', *a])
    text = 'at 2 bits, beyond the paper: norm_after, bound_steps, centred, peel, input_noise, reestimate (--as-published leaves them out)'
    assert text in run('--weight-bits', '2').output
    assert 'centred' not in run('--weight-bits', '2', '--set', 'centred=false').output.split('(--as-published')[0]
    assert text.replace('at 2', 'at 4') in run('--weight-bits', '4').output
    assert 'at 2 bits, beyond the paper: bound_steps (' in run('--weight-bits', '2', '--method', 'plain').output
    assert 'beyond the paper' not in run('--weight-bits', '4', '--as-published').output + run('--weight-bits', '8').output
    assert '4 bits and fewer' in str(run('--weight-bits', '8', '--as-published').exception)
