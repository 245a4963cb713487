"OpenVINO reads the files for it and computes the reference, where the package is installed."
import pytest, torch
from torch import nn
from repq.deploy.integer_grids import Grid, to_grid
from repq.export import borders, instructions, onnx_session, openvino_layers, openvino_model, run_onnx, run_openvino, to_onnx
from repq.models import create_model
from repq.surgery import calibrate, quantize

def network(name):
    res = create_model(name, in_channels=1, **({} if 'sr' in name else dict(num_classes=10)))
    for m in res.modules():
        if isinstance(m, nn.PReLU): nn.init.uniform_(m.weight, .1, .4) # slopes of 1/4 give values exactly between two integers
    return res

CASES = [('repvgg_a0_tiny', 4), ('ac_resnet18_tiny', 8), ('ac_resnet18_tiny', 4), ('ac_resnet18_tiny', 2), ('mobileone_s0_tiny', 4), ('ecbsr_m4c8', 4)]

@pytest.mark.parametrize('name,bits', CASES)
def test_files_for_openvino(name, bits, tmp_path):
    torch.manual_seed(0)
    images, x = torch.rand(32, 1, 8, 8), torch.rand(4, 1, 8, 8)
    net = to_onnx(calibrate(quantize(network(name), bits, bits, verbose=False), [images]), tmp_path/'net.onnx', images, 'openvino')
    want = net(x)
    assert torch.equal(run_onnx(onnx_session(tmp_path/'net.onnx', exact=False), x), want) # ONNX Runtime reads it as well
    pytest.importorskip('openvino')
    compiled = openvino_model(tmp_path/'net.onnx', shape=x.shape)
    assert torch.equal(run_openvino(compiled, x), want)
    one = openvino_model(tmp_path/'net.onnx', shape=(1, *x.shape[1:])) # maps of one pixel, computed wrongly where the number of images is open
    assert torch.equal(torch.cat([run_openvino(one, v[None]) for v in x]), want)
    layers = [r for r in openvino_layers(compiled) if r['kind'] in ('Convolution', 'GroupConvolution', 'FullyConnected')]
    assert len(layers) == sum(s.op == 'layer' for s in net.steps)

@pytest.mark.parametrize('bits', [8, 4, 2])
def test_many_values(bits, tmp_path):
    "RepVGG-A0: of so many values some lie next to a border between two integers, where other formulas than the reference's decide otherwise; 8 of 8 images differed in the file of before"
    pytest.importorskip('openvino')
    torch.manual_seed(0)
    x = torch.randn(8, 3, 64, 64)
    model = calibrate(quantize(create_model('repvgg_a0'), bits, bits, verbose=False), [x])
    for profile in ('openvino', 'openvino_vnni') if 'VNNI' in instructions() else ('openvino',):
        net = to_onnx(model, tmp_path/'net.onnx', x, profile)
        compiled = openvino_model(tmp_path/'net.onnx', shape=x.shape)
        assert torch.equal(run_openvino(compiled, x), net(x))
        if profile == 'openvino_vnni': assert all(r['precision'] == 'u8' for r in openvino_layers(compiled) if r['kind'] in ('Convolution', 'FullyConnected'))

@pytest.mark.parametrize('grid', [Grid(.1), Grid(.0371), Grid(.3, 8, 0, 15), Grid(.7, 0, 0, 3), Grid(.2, 0, -128, 127, 'int8'), Grid(3e-7, 128), Grid(1e5)], ids=str)
def test_borders_are_the_reference(grid):
    edges = torch.from_numpy(borders(grid))
    assert torch.equal(to_grid(edges, grid), torch.arange(grid.low + 1, grid.high + 1).int())
    assert torch.equal(to_grid(edges.nextafter(torch.tensor(-torch.inf)), grid), torch.arange(grid.low, grid.high).int())

def test_it_is_for_one_size_where_a_mean_is(tmp_path):
    import onnx
    x = torch.rand(4, 1, 8, 8)
    for name, fixed in ('repvgg_a0_tiny', True), ('ecbsr_m4c8', False):
        to_onnx(calibrate(quantize(network(name), 4, 4, verbose=False), [x]), tmp_path/'net.onnx', x, 'openvino')
        assert (onnx.load(tmp_path/'net.onnx').graph.input[0].type.tensor_type.shape.dim[2].dim_value == 8) == fixed

def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'openvino', None)
    with pytest.raises(ImportError, match=r'repq\[runtimes\]'): openvino_model(tmp_path/'net.onnx')
