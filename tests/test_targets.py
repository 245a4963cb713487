"Every operation of the integer network in every target: written and equal in each value, or refused by the names of the step and its operation, with what would do."
import pytest, torch
from repq.deploy.executorch import executorch_bytes, executorch_method, run_executorch
from repq.deploy.export import instructions, onnx_session, run_onnx
from repq.deploy.integer_grids import Grid
from repq.deploy.integer_network import IntegerNetwork
from repq.deploy.integer_ops import OPERATIONS, IntegerOp, Step
from repq.deploy.islands import float_call
from repq.deploy.onnx_writer import onnx_model
from repq.deploy.openvino import openvino_model, run_openvino
from repq.deploy.qonnx_writer import qonnx_bytes, qonnx_session, run_qonnx
from repq.deploy.shapes import resampling
from repq.deploy.tables import fill_table
from repq.deploy.tflite import run_tflite, tflite_session
from repq.deploy.tflite_writer import tflite_bytes
from repq.method.layers import headroom

# Grids: bytes from zero, bytes of both signs, 4 and 2 bits from zero, both ends cut off, 4 bits of both signs. Their steps are
# such that many values lie half-way between two integers, or next to it, where any other formula than the reference's shows.
BYTE, SIGNED, FOUR, TWO, CUT, ODD = Grid(.02), Grid(.05, 128), Grid(.3, 0, 0, 15), Grid(.9, 0, 0, 3), Grid(.04, 100, 30, 180), Grid(.1, 8, 0, 15)
MAP, ROW, TOKENS = (4, 6, 8), (12,), (3, 5)

class Case:
    "A network of one operation that reads values of the grids `reads` (None: floats), cut out of one input, and gives `grid`"
    def __init__(self, op, grid, *reads, shape=MAP, **params): self.op, self.grid, self.reads, self.shape, self.params = op, grid, reads, shape, params

    def net(self):
        steps, names = [], []
        for i, g in enumerate(self.reads):
            part = 'x'
            if len(self.reads) > 1:
                steps.append(Step(part := f'part{i}', 'slice', ['x'], None, dict(index=[[None]*3, [i*self.shape[0], (i + 1)*self.shape[0], None], *[[None]*3]*(len(self.shape) - 1)])))
            if g is not None: steps.append(Step(f'q{i}', 'quantize', [part], g))
            names.append(part if g is None else f'q{i}')
        steps.append(Step('y', self.op, names, self.grid, self.params))
        if self.grid is not None: steps.append(Step('out', 'dequantize', ['y']))
        return IntegerNetwork(steps, 'x', steps[-1].name, OPERATIONS[self.op].fixed)

    def images(self, n=16):
        "Random ones, and in the second half of them the borders between integers of the first grid that there is, and their neighbours"
        g = torch.Generator().manual_seed(1)
        x = torch.randn(n, self.shape[0]*len(self.reads), *self.shape[1:], generator=g)*2
        grid = next((g for g in (*self.reads, self.grid) if g), BYTE)
        half = ((x[n//2:]/grid.step).floor() + .5)*torch.tensor(grid.step)
        away = torch.randint(-1, 2, half.shape, generator=g)
        x[n//2:] = torch.where(away == 0, half, half.nextafter(away*torch.tensor(9e9)))
        return x

def layer(grid, own=BYTE, bits=8, outs=6, ins=4, kernel=(3, 3), groups=1, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mode='zeros', bias=None, shape=MAP, sign=1):
    g = torch.Generator().manual_seed(0)
    end = 2**(bits - 1)
    w = torch.randint(-end, end, (outs, ins//groups, *kernel), generator=g).to(torch.int8)
    if bias is None: bias = int(end*w[0].numel()**.5*(own.high - own.low)/8) + 1
    step = 1. if grid is None else grid.step
    factor = 1/(torch.arange(outs)*4 + 10.)/2**max(round(float(torch.tensor(end*w[0].numel()**.5/20).log2())), 0) # of a tenth and the like: sums of 5, 15, ... become halves
    scale = factor*step/own.step/headroom(bits)
    if sign < 0: scale[::2] *= -1
    p = dict(weight=w, bits=bits, room=headroom(bits), scale=scale, bias=torch.randint(-bias, bias + 1, (outs,), generator=g).int())
    if kernel: p |= dict(groups=groups, stride=stride, padding=padding, dilation=dilation, padding_mode=mode)
    return Case('layer', grid, own, shape=shape, **p)

def resampled(grid, own, function, **args): return Case('resample', grid, own, **dict(zip(('rows', 'columns', 'factors'), resampling(dict(function=function, args=args), *MAP[1:]))))
def table(grid, own, function, shape=MAP, **args):
    from repq.networks.further_readers import TABLES
    return Case('table', grid, own, shape=shape, table=fill_table(lambda v: TABLES[function](v, **args), own, grid), function=function, args=args)
def pool(grid, own, kernel=2, stride=2, padding=0, dilation=1, ceil_mode=False):
    return Case('maxpool', grid, own, **{k: [v, v] for k, v in dict(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation).items()}, ceil_mode=ceil_mode)
def sliced(*index, own=ODD, shape=MAP): return Case('slice', own, own, shape=shape, index=[[None]*3, *index])
def of_torch(call, **kw):
    "A call of torch, as an island has it"
    class Calls(torch.nn.Module):
        def forward(self, x): return call(x)
    graph = torch.fx.symbolic_trace(m := Calls()).graph
    node, = (n for n in graph.nodes if n.op not in ('placeholder', 'output'))
    return Case('float', None, None, **float_call(node, m) | kw)

ALL = [None]*3
CASES = dict(
    layer=layer(BYTE), layer_4=layer(FOUR, FOUR, 4), layer_2=layer(TWO, TWO, 2), layer_mixed=layer(TWO, SIGNED, 3, padding=(1, 1)), layer_signed=layer(SIGNED, SIGNED, padding=(1, 1)), layer_cut=layer(CUT, CUT, 5),
    layer_odd=layer(ODD, ODD, 4, padding=(1, 1)), layer_1x1=layer(BYTE, kernel=(1, 1)), layer_strided=layer(BYTE, stride=(2, 2), padding=(1, 1)), layer_dilated=layer(BYTE, dilation=(2, 2), padding=(2, 2)), layer_wide=layer(BYTE, kernel=(1, 3), padding=(0, 1)),
    layer_groups=layer(BYTE, groups=2, padding=(1, 1)), layer_depthwise=layer(BYTE, groups=4, outs=4, padding=(1, 1)), layer_multiplied=layer(FOUR, FOUR, 4, groups=4, outs=8), layer_negative=layer(BYTE, sign=-1), layer_one=layer(BYTE, outs=1),
    layer_reflect=layer(BYTE, padding=(1, 2), mode='reflect'), layer_replicate=layer(SIGNED, SIGNED, padding=(1, 1), mode='replicate'), layer_circular=layer(BYTE, padding=(1, 1), mode='circular'), layer_large_bias=layer(BYTE, bias=2**24 + 3),
    rows=layer(BYTE, ins=12, kernel=(), shape=ROW), rows_4=layer(FOUR, FOUR, 4, ins=12, kernel=(), shape=ROW), rows_floats=layer(None, ins=12, kernel=(), shape=ROW), rows_floats_4=layer(None, SIGNED, 4, ins=12, kernel=(), shape=ROW, sign=-1),
    add=Case('add', SIGNED, SIGNED, BYTE), add_4=Case('add', FOUR, ODD, FOUR), add_2=Case('add', TWO, SIGNED, TWO), add_rows=Case('add', SIGNED, SIGNED, ODD, shape=ROW), add_tokens=Case('add', SIGNED, SIGNED, ODD, shape=TOKENS), add_floats=Case('add', None, None, None),
    fused_add=Case('fused_add', SIGNED, SIGNED, BYTE), mean=Case('mean', Grid(.004), BYTE), mean_signed=Case('mean', Grid(.009, 100), SIGNED), mean_4=Case('mean', Grid(.05, 0, 0, 15), FOUR),
    prelu=Case('prelu', SIGNED, Grid(.05, 90), slope=torch.tensor([.1, .25, .3, -.2]).view(-1, 1, 1)), prelu_one=Case('prelu', ODD, SIGNED, slope=torch.tensor([.25]).view(-1, 1, 1)), prelu_rows=Case('prelu', SIGNED, ODD, shape=ROW, slope=torch.linspace(.1, .5, 12)), prelu_floats=Case('prelu', None, None, slope=torch.tensor([.13]).view(-1, 1, 1)),
    quantize=Case('quantize', CUT, None), quantize_4=Case('quantize', ODD, None), quantize_rows=Case('quantize', SIGNED, None, shape=ROW), requantize=Case('requantize', SIGNED, BYTE), requantize_2=Case('requantize', TWO, ODD), requantize_finer=Case('requantize', Grid(.007, 128), ODD), dequantize=Case('dequantize', None, CUT),
    clip=Case('clip', Grid(.05, 128, 128, 200), SIGNED, low=128, high=200), clip_floats=Case('clip', None, None, low=-.3, high=1.7), clip_below=Case('clip', None, None, low=-.3, high=float('inf')), clip_above=Case('clip', None, None, low=-float('inf'), high=.6),
    maxpool=pool(ODD, ODD), maxpool_3=pool(SIGNED, SIGNED, 3, 2, 1), maxpool_ceil=pool(BYTE, BYTE, 3, 2, 0, 1, True), maxpool_dilated=pool(BYTE, BYTE, 2, 1, 0, 2), maxpool_floats=pool(None, None, 3, 1, 1),
    flatten=Case('flatten', SIGNED, SIGNED), flatten_floats=Case('flatten', None, None), shuffle=Case('shuffle', ODD, ODD, factor=2), shuffle_8=Case('shuffle', BYTE, BYTE, shape=(8, 3, 4), factor=2), take=Case('take', SIGNED, SIGNED, index=torch.tensor([3, 0, 0, 2])), take_rows=Case('take', SIGNED, SIGNED, shape=ROW, index=torch.arange(12).flip(0)),
    enlarge=Case('enlarge', CUT, CUT, scale=[2, 3]), concat=Case('concat', SIGNED, SIGNED, SIGNED), concat_down=Case('concat', ODD, ODD, ODD, dim=2), concat_rows=Case('concat', BYTE, BYTE, BYTE, shape=ROW), concat_bounds=Case('concat', SIGNED, Grid(.05, 128, 128, 255), SIGNED), concat_floats=Case('concat', None, None, None),
    reshape=Case('reshape', SIGNED, SIGNED, shape=MAP), permute=Case('permute', ODD, ODD, dims=[0, 2, 3, 1]), permute_rows=Case('permute', ODD, ODD, shape=TOKENS, dims=[0, 2, 1]), permute_floats=Case('permute', None, None, dims=[0, 3, 1, 2]),
    slice=sliced([1, None, 2], [0, 4, None]), slice_last=sliced(-1, ALL, [1, None, None]), slice_new=sliced(ALL, ['new'], ALL, ALL), slice_rows=sliced([2, 9, 3], shape=ROW), slice_floats=sliced([1, 3, None], own=None),
    pad=Case('pad', SIGNED, SIGNED, pad=[1, 2, 0, 1], mode='constant', value=0.), pad_value=Case('pad', ODD, ODD, pad=[1, 0, 2, 1], mode='constant', value=.3), pad_crops=Case('pad', BYTE, BYTE, pad=[1, -2, 0, 1], mode='constant', value=.5), pad_reflect=Case('pad', CUT, CUT, pad=[1, 2, 2, 1], mode='reflect', value=0.),
    pad_replicate=Case('pad', ODD, ODD, pad=[0, 2, 1, 0], mode='replicate', value=0.), pad_circular=Case('pad', SIGNED, SIGNED, pad=[1, 2, 2, 1], mode='circular', value=0.), pad_floats=Case('pad', None, None, pad=[1, 2, 0, 1], mode='constant', value=.25), expand=Case('expand', ODD, ODD, shape=(4, 1, 8), sizes=[-1, -1, 5, -1]),
    roll=Case('roll', SIGNED, SIGNED, shifts=[1, -2], dims=[2, 3]), flip=Case('flip', CUT, CUT, dims=[2, 1]), amax=Case('amax', ODD, ODD, shape=(4, 2, 3), dims=[2, 3], keepdim=True), amax_flat=Case('amax', SIGNED, SIGNED, dims=[1], keepdim=False), amax_floats=Case('amax', None, None, dims=[3], keepdim=True),
    resample=resampled(SIGNED, SIGNED, 'avg_pool2d', kernel_size=3, stride=2, padding=1, count_include_pad=False), resample_bilinear=resampled(ODD, SIGNED, 'interpolate', scale_factor=2, mode='bilinear'), resample_4=resampled(FOUR, FOUR, 'adaptive_avg_pool2d', output_size=(4, 5)),
    axes=Case('axes', SIGNED, SIGNED, dims=[3], keepdim=True, count=8), axes_flat=Case('axes', Grid(.02, 128), ODD, dims=[1], keepdim=False, count=4), axes_sum=Case('axes', Grid(.2, 128), SIGNED, dims=[2, 3], keepdim=True, count=1), axes_tokens=Case('axes', SIGNED, SIGNED, shape=TOKENS, dims=[1], keepdim=False, count=3),
    table=table(Grid(.02, 12), SIGNED, 'silu'), table_4=table(ODD, FOUR, 'tanh'), table_rows=table(Grid(1/255), SIGNED, 'sigmoid', ROW), table_cut=table(CUT, CUT, 'gelu'),
    mul=Case('mul', SIGNED, SIGNED, BYTE), mul_4=Case('mul', FOUR, FOUR, BYTE), mul_odd=Case('mul', ODD, ODD, SIGNED), mul_tokens=Case('mul', SIGNED, SIGNED, ODD, shape=TOKENS), mul_floats=Case('mul', None, None, None),
    sub=Case('sub', SIGNED, SIGNED, BYTE), sub_2=Case('sub', TWO, ODD, FOUR), sub_floats=Case('sub', None, None, None), affine=Case('affine', SIGNED, BYTE, scale=torch.tensor(.75), bias=torch.tensor(-.2)), affine_channels=Case('affine', ODD, SIGNED, scale=torch.linspace(-1, 2, 4).view(-1, 1, 1), bias=torch.linspace(.3, -.3, 4).view(-1, 1, 1)),
    affine_one=Case('affine', SIGNED, BYTE, scale=torch.tensor(1.), bias=torch.tensor(0.)), affine_rows=Case('affine', SIGNED, SIGNED, shape=ROW, scale=torch.linspace(-1, 2, 12), bias=torch.zeros(12)), affine_floats=Case('affine', None, None, scale=torch.tensor(.7), bias=torch.tensor(-.2)),
    softmax=of_torch(lambda x: x.softmax(1)))
CASES['reshape'].params = dict(shape=[-1, 8, 24])

def file(made, opened, run):
    "What a file gives"
    def judge(net, x, folder):
        (folder/'net').write_bytes(made(net, x))
        return run(opened(folder/'net'), x)
    return judge

def onnx(profile, opened=lambda p: onnx_session(p, exact=False), run=run_onnx): return file(lambda net, x: onnx_model(net, x, profile).SerializeToString(), opened, run)

VNNI = any(i in instructions() for i in ('VNNI', 'AMX', 'dot product'))
TARGETS = dict( # name -> (package that runs it, judge)
    onnx=('onnxruntime', onnx('integers')),
    vnni=('onnxruntime', onnx('vnni', lambda p: onnx_session(p, exact=not VNNI))),
    onnx_for_openvino=('onnxruntime', onnx('openvino')),
    openvino=('openvino', onnx('openvino', openvino_model, run_openvino)),
    openvino_vnni=('openvino', onnx('openvino_vnni', openvino_model, run_openvino)),
    tflite=('ai_edge_litert.interpreter', file(tflite_bytes, tflite_session, run_tflite)),
    qonnx=('qonnx', file(qonnx_bytes, qonnx_session, run_qonnx)),
    pte=('executorch', file(executorch_bytes, executorch_method, run_executorch)))

OLD, ISLAND = 'a sum of version 0.1.0, .*what would do: making the integers anew', 'floating point: softmax.*what would do'
REFUSED = dict( # target -> case -> why
    tflite=dict(softmax=ISLAND, maxpool_dilated='no dilation, here .*what would do'),
    qonnx=dict(softmax='give it one .*or leave it out'), pte=dict(softmax='give it one', pad_crops='crops nothing; what would do'))
for t in TARGETS: REFUSED.setdefault(t, {})['fused_add'] = OLD

def pairs(a, b):
    "Each integer of `a` with each of `b`, as an image of two values side by side"
    qa, qb = torch.cartesian_prod(torch.arange(a.low, a.high + 1), torch.arange(b.low, b.high + 1)).T
    return torch.stack([(qa - a.zero)*a.step, (qb - b.zero)*b.step]).view(1, 2, a.high - a.low + 1, -1)

def test_every_operation_has_a_case():
    steps = {n for n, o in OPERATIONS.items() if type(o).compute is not IntegerOp.compute}
    assert steps - {c.op for c in CASES.values()} == {'island', 'pick', 'widen', 'corner', 'channel_shuffle'} # made by the writer; others before they are steps

@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('target', TARGETS)
def test_sweep(target, case, tmp_path):
    package, judge = TARGETS[target]
    pytest.importorskip(package)
    net, x = CASES[case].net(), CASES[case].images()
    want, why = net(x), REFUSED.get(target, {}).get(case)
    if why is None:
        got = judge(net, x, tmp_path)
        if CASES[case].op == 'float': return torch.testing.assert_close(got, want) # an island
        assert got.shape == want.shape and torch.equal(got, want), f'{(got != want).sum()} of {want.numel()} differ'
    else:
        with pytest.raises(ValueError, match=f"'y', an operation '{CASES[case].op}', cannot be written to .*: .*{why}"): judge(net, x, tmp_path)
        assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('case', CASES)
def test_cases_are_more_than_one_value(case):
    "No case is one whose values are all the same"
    y = CASES[case].net()(CASES[case].images())
    assert y.unique().numel() > 1

PAIRS = (BYTE, SIGNED, SIGNED), (SIGNED, Grid(.05, 90), Grid(.1, 100)), (Grid(.03), Grid(.017, 128), Grid(.041, 90)), (FOUR, BYTE, ODD), (TWO, ODD, Grid(.3, 2, 0, 15))

@pytest.mark.parametrize('grids', PAIRS, ids=range(len(PAIRS)))
@pytest.mark.parametrize('op', ['add', 'mul', 'sub'])
@pytest.mark.parametrize('target', TARGETS)
def test_all_pairs_of_integers(target, op, grids, tmp_path):
    package, judge = TARGETS[target]
    pytest.importorskip(package)
    a, b, y = grids
    x = pairs(a, b)
    net = Case(op, y, a, b, shape=(1, *x.shape[2:])).net()
    got, want = judge(net, x, tmp_path), net(x)
    assert torch.equal(got, want), f'{(got != want).sum()} of {want.numel()} differ'
