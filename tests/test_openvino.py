"OpenVINO reads the files for it and computes the reference, where the package is installed."
import pytest, torch
from torch import nn
from repq.export import onnx_session, openvino_layers, openvino_model, run_onnx, run_openvino, to_onnx
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
    compiled = openvino_model(tmp_path/'net.onnx')
    torch.testing.assert_close(run_openvino(compiled, x), want, rtol=0, atol=1e-6*want.abs().max().item()) # one integer less is a thousand times that
    layers = [r for r in openvino_layers(compiled) if r['kind'] in ('Convolution', 'GroupConvolution', 'FullyConnected')]
    assert len(layers) == sum(s.op == 'layer' for s in net.steps)

def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'openvino', None)
    with pytest.raises(ImportError, match=r'repq\[runtimes\]'): openvino_model(tmp_path/'net.onnx')
