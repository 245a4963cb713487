"x86 without VNNI adds pairs of products in 16 bits: a model of that instruction, so that no processor decides what these tests say."
import json
import numpy as np, onnx, pytest, torch, torch.nn.functional as F
from torch import nn
from helpers import randomize
from repq.export import PROFILES, check_saturation, onnx_session, run_onnx, to_onnx
from repq.deploy.integer_grids import accumulate
from repq.integers import load_integers, save_integers, to_integer
from repq.layers import headroom
from repq.models import create_model
from repq.deploy.onnx_writer import onnx_model
from repq.surgery import calibrate, quantize

def quantized(name, bits, x, **kw): return calibrate(quantize(randomize(create_model(name, 10, 1)), bits, bits, verbose=False, **kw), [x])

def add_pairs(x, w): # (n, k) bytes, (k, out) signed bytes
    "vpmaddubsw and vpmaddwd: pairs of products are added in int16 and cut off there, the rest in int32"
    x, w = (np.pad(v.astype(np.int64), [(0, v.shape[d] % 2 if d == i else 0) for d in (0, 1)]) for v, i in ((x, 1), (w, 0)))
    pairs = x[:, 0::2, None]*w[None, 0::2] + x[:, 1::2, None]*w[None, 1::2]
    return pairs.clip(-2**15, 2**15 - 1).sum(1)

def widen(x, w): return x.astype(np.int64) @ w.astype(np.int64) # unsigned weights: 16 bits first, and sums in 32

def test_the_model_of_the_instruction():
    x, w = np.array([[255, 255, 255]]), np.array([[127], [127], [127]])
    assert add_pairs(x, w) == [[32767 + 255*127]] and widen(x, w) == [[3*255*127]]
    assert add_pairs(x, np.array([[64], [64], [-64]])) == [[255*64]]

def layers(path, net, x, order=None):
    "(name, sums of products as an x86 processor without VNNI has them, the exact ones) of each layer of a file"
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    values, grids = net.values(x), {s.name: s.grid for s in net.steps}
    for s in (s for s in net.steps if s.op == 'layer'):
        p, (i,), w = s.params, s.inputs, constants[f'{s.name}.weight']
        zero, v = grids[i].zero, values[i]
        exact = accumulate({**p, 'bias': torch.zeros(len(w))}, v, grids[i])
        if w.ndim == 2: patches, groups, shape = v.numpy()[:, None], 1, exact.shape
        else:
            h, width = p['padding']
            v = F.pad(v.float(), (width, width, h, h), value=zero)
            groups, shape = p['groups'], exact.shape
            patches = F.unfold(v, w.shape[2:], p['dilation'], 0, p['stride']).transpose(1, 2).numpy().astype(int)
        signed = w.dtype == np.int8
        sums = []
        for g, wg in enumerate(np.split(w.reshape(len(w), -1), groups)):
            k = wg.shape[1]
            places = np.arange(k) if order is None else np.random.default_rng(order).permutation(k)
            xs = patches[..., g*k:(g+1)*k].reshape(-1, k)
            one = (add_pairs if signed else widen)(xs[:, places], wg.T[places])
            w0 = 0 if signed else 128
            sums.append(one - zero*wg.astype(int).sum(1) - w0*(xs - zero).sum(1, keepdims=True))
        got = torch.from_numpy(np.concatenate(sums, 1)).view(len(x), -1, len(w)).transpose(1, 2).reshape(shape)
        yield s.name, got.double(), exact

def saturating(path, net, x): return [n for order in (None, 0, 1) for n, got, want in layers(path, net, x, order) if not torch.equal(got, want)]

def as_version_1(net, path):
    "`net` in a file as repq 0.1.0 wrote them: weights fill the byte, biases in that unit"
    for s in (s for s in net.steps if s.op == 'layer'):
        p, more = s.params, 2**(8 - s.params['bits'])//s.params['room']
        p['bias'], p['scale'] = p['bias']*more, p['scale']/more
        del p['room']
    from repq.deploy import integer_files
    version, integer_files._VERSION = integer_files._VERSION, 1
    try: save_integers(net, path)
    finally: integer_files._VERSION = version
    return path

@pytest.mark.parametrize('bits', [8, 4, 2])
@pytest.mark.parametrize('name', ['repvgg_a0_tiny', 'mobileone_s0_tiny'])
def test_files_of_the_old_form_saturate_and_the_new_ones_do_not(name, bits, tmp_path):
    x = torch.rand(8, 1, 16, 16)
    q = quantized(name, bits, x)
    for profile in 'integers', 'packed':
        net = to_onnx(q, tmp_path/'new.onnx', x, profile)
        if profile == 'integers': assert not saturating(tmp_path/'new.onnx', net, x)
        assert all(r['safe'] for r in check_saturation(tmp_path/'new.onnx'))
    old = load_integers(as_version_1(to_integer(q, x), tmp_path/'old.safetensors'))
    (tmp_path/'old.onnx').write_bytes(onnx_model(old, x, 'vnni').SerializeToString())           # what 0.1.0 wrote
    bad = {r['layer'] for r in check_saturation(tmp_path/'old.onnx') if not r['safe']}
    assert bad and set(saturating(tmp_path/'old.onnx', old, x)) and set(saturating(tmp_path/'old.onnx', old, x)) <= bad
    (tmp_path/'again.onnx').write_bytes(onnx_model(old, x, 'integers').SerializeToString())     # an old network in a new file
    assert not saturating(tmp_path/'again.onnx', old, x)

@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('per_channel', [True, False])
def test_stored_weights(bits, per_channel, tmp_path):
    "Signed and within ±64 up to 7 bits, unsigned at 8, for dense, grouped, depthwise and fully connected layers"
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(4, 4, 9, 9)
    to_onnx(calibrate(quantize(net, bits, 8, first_last_bits=None, per_channel=per_channel, verbose=False), [x]), tmp_path/'net.onnx', x)
    rows = check_saturation(tmp_path/'net.onnx')
    assert len(rows) == 4 and all(r['safe'] for r in rows)
    for t in onnx.load(tmp_path/'net.onnx').graph.initializer:
        if t.name.endswith('.weight'):
            w = onnx.numpy_helper.to_array(t)
            assert w.dtype == np.uint8 if bits == 8 else w.dtype == np.int8 and abs(w.astype(int)).max() <= 64 and not (w % headroom(bits)).any()

@pytest.mark.parametrize('bits', [8, 4])
def test_any_file_is_exact_with_the_option(bits, tmp_path):
    x = torch.rand(8, 1, 16, 16)
    q = quantized('repvgg_a0_tiny', bits, x)
    net = to_onnx(q, tmp_path/'net.onnx', x, 'vnni')
    assert not all(r['safe'] for r in check_saturation(tmp_path/'net.onnx')) and saturating(tmp_path/'net.onnx', net, x)
    assert torch.equal(run_onnx(onnx_session(tmp_path/'net.onnx'), x), net(x))

def test_what_could_saturate_is_not_written(tmp_path, monkeypatch):
    from repq.deploy import onnx_writer
    x = torch.rand(2, 1, 16, 16)
    q = quantized('repvgg_a0_tiny', 8, x)
    monkeypatch.setattr(onnx_writer, '_stored', lambda p, profile: (p['weight'].numpy()*np.int8(p['room']), np.int8(0), p['scale'].numpy()))
    for profile in PROFILES.keys() - onnx_writer.FORMS.keys(): # those keep weights of 8 bits out of bytes
        if PROFILES[profile].exact:
            with pytest.raises(ValueError, match="layer '.*': a pair of its products could reach [0-9,]+, and on x86 without VNNI"): to_onnx(q, tmp_path/'no.onnx', x, profile)
            assert not (tmp_path/'no.onnx').exists()
        else: to_onnx(q, tmp_path/'yes.onnx', x, profile)

def test_other_files_are_checked(tmp_path):
    "Operations on integers without dequantization, of whoever wrote them; floats are none of them"
    make = onnx.helper
    def model(kind, w):
        out = make.make_tensor_value_info('y', onnx.TensorProto.INT32, None)
        return make.make_model(make.make_graph([make.make_node(kind, ['x', 'w'], ['y'], name='it')], 'g', [make.make_tensor_value_info('x', onnx.TensorProto.UINT8, None)], [out], [onnx.numpy_helper.from_array(w, 'w')]))
    w = np.zeros((6, 2), np.int8); w[1, 0], w[4, 0], w[:, 1] = 127, -1, 64
    assert check_saturation(model('MatMulInteger', w)) == [dict(layer='it', form='int8', pair=255*128, safe=True)]                       # columns are outputs
    assert not check_saturation(model('ConvInteger', np.full((1, 2, 1, 1), -65, np.int8)))[0]['safe']
    assert check_saturation(model('ConvInteger', np.full((1, 2, 1, 1), 255, np.uint8)))[0]['safe'] and check_saturation(model('MatMul', w.astype(np.float32))) == []

@pytest.mark.parametrize('name', ['repvgg_a0_tiny', 'ac_resnet18_tiny'])
def test_integer_files_of_version_0_1_0(name, tmp_path):
    "They compute what they did: the same products in another unit, and sums by fused multiply-adds"
    x = torch.rand(8, 1, 16, 16)
    for bits in 8, 4, 2:
        net = to_integer(quantized(name, bits, x), x)
        y = net(x)
        old = load_integers(as_version_1(net, tmp_path/'old.safetensors'))
        assert {s.op for s in old.steps if s.grid} & {'add', 'fused_add'} == ({'fused_add'} if 'resnet' in name else set())
        assert {s.params['room'] for s in old.steps if s.op == 'layer'} == ({1} if bits == 8 else {1, 2**(8 - bits)})
        if 'resnet' not in name: assert torch.equal(old(x), y)
        else: assert (old(x) - y).abs().max() < .2*y.abs().max()
    from safetensors.torch import load_file, save_file
    t = load_file(tmp_path/'old.safetensors')
    text = json.dumps({**json.loads(bytes(t['network'].tolist())), 'version': 3}).encode()
    save_file({**t, 'network': torch.frombuffer(bytearray(text), dtype=torch.uint8)}, tmp_path/'newer.safetensors')
    with pytest.raises(ValueError, match='its version is 3, of a newer repq'): load_integers(tmp_path/'newer.safetensors')
