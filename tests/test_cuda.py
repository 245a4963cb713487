"What differs on a GPU: every test compares it with the CPU. Skipped without one; REPQ_TEST_DEVICE=cpu runs them on the CPU, to try the tests themselves."
import copy, os
import pytest, torch
from torch import nn
import repq.blocks as blocks
from repq.method.grids import fake_quantize, grid, one_kernel
from repq.method.minerror import min_error_step
from repq.models import create_model
from repq.recipes import get_recipe
from repq.runs import train
from repq.surgery import calibrate, deploy, quantize, quantize_sums
from helpers import FULLGRAPH, close, randomize

DEVICE = os.environ.get('REPQ_TEST_DEVICE', 'cuda')
pytestmark = pytest.mark.skipif(DEVICE == 'cuda' and not torch.cuda.is_available(), reason='needs a CUDA device')
STATISTICS = 'exact', 'estimated', 'corrected', 'sampled'
BLOCKS = 'RepVGGBlock', 'ACBlock', 'DiverseBranchBlock', 'MobileOneBlock', 'QARepVGGBlock', 'RepSRBlock'

@pytest.fixture(autouse=True)
def float32():
    "Convolutions in float32 proper: what is compared are formulas"
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before

@pytest.mark.parametrize('bits, centred', [(2, False), (2, True), (4, False), (4, True), (8, False)])
@pytest.mark.parametrize('per_channel', [False, True])
def test_rounding_gives_the_same_bits(bits, centred, per_channel):
    w, g = torch.randn(2, 32, 16, 3, 3)
    w[0, 0, 0] = torch.tensor([torch.inf, -torch.inf, 0])
    w[0, 0, 0].clamp_(-9, 9)
    qn, qp = grid(bits, True, centred)
    steps = min_error_step(w, qn, qp, per_channel=per_channel)
    assert torch.equal(min_error_step(w.to(DEVICE), qn, qp, per_channel=per_channel).cpu(), steps)
    results = []
    for device in 'cpu', DEVICE:
        v, s = (t.to(device, copy=True).requires_grad_() for t in (w, steps))
        q = fake_quantize(v, s, qn, qp)
        q.backward(g.to(device))
        results.append([t.detach().cpu() for t in (q, v.grad, s.grad)])
    (q, gv, gs), (q2, gv2, gs2) = results
    assert torch.equal(q, q2) and torch.equal(gv, gv2)
    close(gs2, gs, 1e-5)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_of_other_types(dtype):
    w, step = torch.randn(64, 9).to(dtype), torch.tensor(.3)
    assert torch.equal(fake_quantize(w.to(DEVICE), step.to(DEVICE), -8, 7).cpu(), fake_quantize(w, step, -8, 7))

def test_rounding_of_what_is_not_finite():
    w = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.])
    got = fake_quantize(w.to(DEVICE), torch.tensor(.5, device=DEVICE), -8, 7).cpu()
    assert torch.equal(got.nan_to_num(9), fake_quantize(w, torch.tensor(.5), -8, 7).nan_to_num(9))

@pytest.mark.skipif(DEVICE == 'cpu', reason='kernels of a GPU')
def test_one_kernel_compiles():
    assert one_kernel(torch.ones(2, device=DEVICE)) is not None

def _step(layer, x):
    "Output and gradients of a training step"
    layer.zero_grad()
    y = layer(x)
    y.square().mean().backward()
    return [y.detach().cpu()] + [p.grad.cpu() for p in layer.parameters() if p.grad is not None]

def alike(got, want, tol=.03):
    "Each tensor relative to its own size, or a hundredth of the largest: sums in another order put some values on the other side of a midpoint"
    least = max(t.double().norm() for t in want)/100
    off = [((a - b).double().norm()/b.double().norm().clamp(min=least)).item() for a, b in zip(got, want, strict=True)]
    assert max(off) < tol, off

@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('statistics', STATISTICS)
@pytest.mark.parametrize('channels_last', [False, True])
def test_a_training_step_is_that_of_the_cpu(name, statistics, channels_last):
    block = randomize(getattr(blocks, name)(16, 16))
    net = quantize(nn.Sequential(block), 4, 4, statistics=statistics, first_last_bits=None, verbose=False).train()
    x = torch.randn(16, 16, 24, 24)
    net(x) # sets the steps
    other, x2 = copy.deepcopy(net).to(DEVICE), x.to(DEVICE)
    if channels_last: other, x2 = other.to(memory_format=torch.channels_last), x2.to(memory_format=torch.channels_last)
    want, got = _step(net, x), _step(other, x2)
    alike(got, want)
    for (n, a), b in zip(net.named_buffers(), other.buffers()):
        if a.is_floating_point(): close(b.cpu(), a, 1e-4, n)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('statistics', STATISTICS)
def test_mixed_precision_trains(dtype, statistics):
    net = quantize(create_model('repvgg_a0_tiny', 10, 1), 4, 4, statistics=statistics, verbose=False).to(DEVICE).train()
    x, y = torch.randn(64, 1, 8, 8, device=DEVICE), torch.randint(10, (64,), device=DEVICE)
    net(x)
    opt, losses = torch.optim.SGD(net.parameters(), .02, momentum=.9), []
    for _ in range(12):
        with torch.autocast(DEVICE, dtype): loss = nn.functional.cross_entropy(net(x).float(), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < .9*losses[0], losses
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in net.parameters())

@pytest.mark.xfail(DEVICE == 'cuda' and not FULLGRAPH, strict=False, reason='on an H100 with torch 2.11 gradients of compiled steps parted from eager ones by 3 to 31 %: not resolved')
@pytest.mark.parametrize('statistics', STATISTICS)
def test_the_compiler_takes_a_training_step(statistics):
    net = quantize(nn.Sequential(blocks.RepVGGBlock(8, 8), nn.ReLU(), blocks.RepVGGBlock(8, 8)), 4, 4, statistics=statistics, verbose=False).to(DEVICE).train()
    x = torch.randn(8, 8, 16, 16, device=DEVICE)
    net(x)
    other = copy.deepcopy(net)
    want, got = _step(net, x), _step(torch.compile(other, fullgraph=FULLGRAPH), x)
    alike(got, want)

def test_steps_from_a_gpu_run_on_a_cpu():
    "Calibrated on the device, deployed there, and the same integers on the CPU"
    net = quantize_sums(quantize(create_model('ac_resnet18_tiny', 10, 1), 4, 4, verbose=False), 8).to(DEVICE)
    x = torch.randn(32, 1, 8, 8)
    calibrate(net, [x.to(DEVICE)]*2)
    there, here = deploy(net, verbose=False), deploy(net.cpu(), verbose=False)
    same = total = 0
    for a, b in zip(there.cpu().buffers(), here.buffers()):
        if not a.is_floating_point(): same, total = same + (a == b).sum().item(), total + a.numel()
    assert same >= .9999*total
    assert (there(x).argmax(1) == here(x).argmax(1)).float().mean() > .9

def test_export_from_the_device(tmp_path):
    pytest.importorskip('onnxruntime')
    from repq.export import to_onnx
    import onnxruntime, numpy as np
    net = quantize(create_model('repvgg_a0_tiny', 10, 1), 4, 4, verbose=False).to(DEVICE)
    x = torch.randn(8, 1, 8, 8)
    calibrate(net, [x.to(DEVICE)])
    files = [tmp_path/'device.onnx', tmp_path/'cpu.onnx']
    to_onnx(net.eval(), files[0], x.to(DEVICE))
    to_onnx(copy.deepcopy(net).cpu().eval(), files[1], x)
    a, b = (onnxruntime.InferenceSession(str(f), providers=['CPUExecutionProvider']) for f in files)
    got, want = (s.run(None, {s.get_inputs()[0].name: x.numpy()})[0] for s in (a, b))
    assert (got.argmax(1) == want.argmax(1)).mean() > .8 and np.isfinite(got).all()

@pytest.mark.parametrize('precision', ['auto', 'float32'])
def test_a_run_that_goes_on_ends_with_the_same_weights(tmp_path, precision):
    "Stopped after an epoch and gone on with, as after a kill"
    recipe = get_recipe('repvgg_a0_tiny', 'repq-bn', epochs=2, precision=precision)
    if DEVICE == 'cpu' and precision == 'float32': pytest.skip('alike on a CPU')
    class Stop(Exception): pass
    def stop(done, of, values):
        if done >= 1: raise Stop('after an epoch')
    quiet = lambda *a: None
    row = train(recipe, tmp_path/'whole', on_epoch=quiet, timing=0)
    with pytest.raises(Stop): train(recipe, tmp_path/'parts', on_epoch=stop, timing=0)
    again = train(recipe, tmp_path/'parts', on_epoch=quiet, timing=0, resume=True)
    assert row['accuracy'] == again['accuracy'] > .3
    from safetensors.torch import load_file
    whole, parts = (load_file(tmp_path/n/'model.safetensors') for n in ('whole', 'parts'))
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


@pytest.mark.skipif(DEVICE == 'cpu', reason='graphs are of a GPU')
@pytest.mark.parametrize('precision', ['bf16', 'float32'])
@pytest.mark.parametrize('method, fields', [('plain', {}), ('merged', dict(norm_after=True)), ('repq-bn', {}), ('repq-bn', dict(norm_after=True, input_noise=True, bound_steps=True, centred=True)),
                                            ('repq-bnest', {}), ('repq-bncorrected', {}), ('repq-bnsample', {})])
def test_recorded_steps_train_as_others_do(tmp_path, recwarn, method, fields, precision):
    quiet, kw = lambda *a: None, dict(epochs=2, precision=precision)
    fp = train(get_recipe('repvgg_a0_tiny', 'plain' if method == 'plain' else 'repq-bn', **kw), tmp_path/'fp', on_epoch=quiet, timing=0)
    recipe = get_recipe('repvgg_a0_tiny', method, 4, **kw, **fields)
    rows = [train(recipe, tmp_path/f'{capture}', tmp_path/'fp', on_epoch=quiet, timing=0, capture=capture) for capture in (True, False)]
    assert not [w for w in recwarn if 'recorded' in str(w.message)]
    assert abs(rows[0]['accuracy'] - rows[1]['accuracy']) < .06, rows
    assert rows[0]['accuracy'] > fp['accuracy'] - .1
