"From a run to a file: post-training quantization, exported files, reports, layers with bits of their own."
import json
import numpy as np, pytest, torch
from repq.deployment import example_images, export_model, export_run, post_training, report_run
from repq.export import onnx_session, optimized_ops, run_onnx
from repq.integers import load_integers
from repq.layers import RepQLayer
from repq.recipes import get_recipe
from repq.runs import eval_run, load_run, train
from repq.surgery import calibrate, quantize

@pytest.fixture(scope='module')
def fp(tmp_path_factory):
    path = tmp_path_factory.mktemp('runs')/'fp'
    train(get_recipe('mobileone_s0_tiny', 'repq-bn', data='digits', epochs=3), path, timing=0)
    return path

def test_from_full_precision_to_a_file(fp, tmp_path):
    bits = {'stages.0.0.conv': [8, 4], 'head': 4}
    row = post_training(fp, tmp_path/'ptq', 8, layer_bits=bits)
    assert row['stage'] == 'post-training' and row['method'] == 'merged'
    assert abs(row['accuracy'] - eval_run(fp)['accuracy']) < .1 and row['accuracy'] == row['merged_accuracy']
    recipe, model, _ = load_run(tmp_path/'ptq')
    assert recipe.layer_bits == bits and recipe.epochs == 0
    assert [(m.weight_quantizer.bits, m.input_quantizer.bits) for n, m in model.named_modules() if isinstance(m, RepQLayer)][1:2] == [(8, 4)] and model.head.weight_quantizer.bits == 4
    text, row = export_run(tmp_path/'ptq'), json.loads((tmp_path/'ptq'/'results.json').read_text())[0]
    assert 'equals the integer reference in all 640 values' in text and f'accuracy {row["integer_accuracy"]:.2%} in integers, {row["accuracy"]:.2%} as trained' in text
    assert abs(row['integer_accuracy'] - row['accuracy']) < .05
    export_run(tmp_path/'ptq', format='safetensors')
    x = example_images(recipe, 16)
    y = run_onnx(onnx_session(tmp_path/'ptq'/'model.onnx'), x)
    assert torch.equal(y, load_integers(tmp_path/'ptq'/'model.integers.safetensors')(x))
    assert optimized_ops(tmp_path/'ptq'/'model.onnx', tmp_path)['QLinearConv'] == 15
    assert 'layers can saturate on any processor (' in text and 'with unsigned weights)' in text
    text = export_run(tmp_path/'ptq', profile='vnni')
    assert 'model-vnni.onnx' in text and 'layers can saturate on x86 without VNNI (unless loaded with session.x64quantprecision=1)' in text and 'equals the integer reference in all 640 values' in text

def test_a_file_that_would_not_agree_is_not_written(fp, tmp_path, monkeypatch):
    from repq.deploy import comparison
    post_training(fp, tmp_path/'ptq')
    given = comparison._run_all
    monkeypatch.setattr(comparison, '_run_all', lambda *args: {n: v + 1 for n, v in given(*args).items()})
    with pytest.raises(ValueError, match='differs from the reference in 640 of 640'): export_run(tmp_path/'ptq')
    assert sorted(p.name for p in (tmp_path/'ptq').iterdir()) == ['model.safetensors', 'recipe.json', 'results.json']

@pytest.mark.parametrize('asked,profile', [(['--openvino'], 'openvino'), (['--openvino', '--vnni'], 'openvino_vnni'), (['--vnni', '--openvino'], 'openvino_vnni')],
                         ids=['openvino', 'openvino-vnni', 'vnni-openvino'])
def test_files_for_openvino_are_asked_for_by_options(fp, tmp_path, asked, profile):
    from typer.testing import CliRunner
    from repq.cli import app
    post_training(fp, tmp_path/'ptq', 4)
    said = CliRunner().invoke(app, ['export', str(tmp_path/'ptq'), *asked])
    assert said.exit_code == 0 and f'model-{profile}.onnx' in said.output and 'equals the integer reference in all 640 values' in said.output
    said = CliRunner().invoke(app, ['export', str(tmp_path/'ptq'), *asked, '--packed'])
    assert said.exit_code != 0 and 'profiles: give one' in str(said.exception)

def test_tensorflow_lite(fp, tmp_path, monkeypatch):
    "The same integers as in ONNX, on images of the run; without LiteRT the file is written and said to be not compared"
    pytest.importorskip('flatbuffers')
    import sys
    from typer.testing import CliRunner
    from repq.commands import deployment
    from repq.cli import app
    post_training(fp, tmp_path/'ptq', 4)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'ai_edge_litert', None); m.setitem(sys.modules, 'ai_edge_litert.interpreter', None)
        said = export_run(tmp_path/'ptq', tmp_path/'unseen.tflite', 'tflite')
        assert 'for one image of 1 × 8 × 8; not compared: ' in said and "pip install 'repq[tflite]'" in said
        m.setitem(sys.modules, 'flatbuffers', None)
        with pytest.raises(ImportError, match=r'repq\[tflite\]'): export_run(tmp_path/'ptq', tmp_path/'no.tflite', 'tflite')
    assert not (tmp_path/'no.tflite').exists()
    pytest.importorskip('ai_edge_litert')
    from repq.export import run_tflite, tflite_session
    res = CliRunner().invoke(app, ['export', str(tmp_path/'ptq'), '--to', 'tflite'])
    assert res.exit_code == 0 and 'model.tflite' in res.output and 'LiteRT with XNNPACK equals the integer reference in all 640 values of 64 images' in ' '.join(res.output.split())
    assert (tmp_path/'ptq'/'model.tflite').read_bytes() == (tmp_path/'unseen.tflite').read_bytes()
    recipe, model, _ = load_run(tmp_path/'ptq')
    export_run(tmp_path/'ptq')
    x = example_images(recipe, 64)
    y = run_tflite(tflite_session(tmp_path/'ptq'/'model.tflite'), x)
    assert torch.equal(y, run_onnx(onnx_session(tmp_path/'ptq'/'model.onnx'), x)) and len(set(y.argmax(1).tolist())) > 5
    with pytest.raises(FileExistsError): export_run(tmp_path/'ptq', format='tflite')
    deployment.export_model(model, tmp_path/'ptq.tflite', [(x[:8], None)])
    compare = deployment._compare
    monkeypatch.setattr(deployment, '_compare', lambda session, run, *args: compare(session, lambda *a: run(*a) + 1, *args))
    with pytest.raises(ValueError, match='LiteRT with XNNPACK differs from the reference in 640 of 640'): export_run(tmp_path/'ptq', tmp_path/'wrong.tflite', 'tflite')
    assert not (tmp_path/'wrong.tflite').exists()
    with pytest.raises(ValueError, match='packed is a profile of ONNX files'): export_run(tmp_path/'ptq', tmp_path/'a.tflite', 'tflite', 'packed')
    with pytest.raises(ValueError, match='the name must end in .tflite'): export_run(tmp_path/'ptq', tmp_path/'a.onnx', 'tflite')

def test_report(fp, tmp_path):
    post_training(fp, tmp_path/'ptq', 4, as_published=True)
    table = report_run(tmp_path/'ptq', tmp_path/'report')
    d = json.loads((tmp_path/'report'/'layers.json').read_text())
    assert (tmp_path/'report'/'layers.md').read_text().startswith(f'{table}\n') and len(d['layers']) == 16 == len(d['alone']) - 1
    assert d['islands'] == ''
    assert d['alone'][''] == pytest.approx(eval_run(fp)['accuracy'])                    # in floats it is the network it was made of
    assert all(r['bit_operations'] == r['macs']*r['weight_bits']*r['input_bits'] for r in d['layers'])
    assert {p.name for p in (tmp_path/'report').iterdir()} == {'layers.md', 'layers.json', 'layers.png', 'steps.png', 'sensitivity.png'}

def test_super_resolution(tmp_path):
    from skimage import data
    from PIL import Image
    photos = tmp_path/'photos'; photos.mkdir()
    for i in range(4): Image.fromarray(data.astronaut()[64*i:64*i + 96, :96]).save(photos/f'{i}.png')
    train(get_recipe('ecbsr_m4c8', 'repq', data=str(photos), benchmarks=str(photos), epochs=1, iterations=3, batch_size=4, crop=32), tmp_path/'fp', timing=0)
    row = post_training(tmp_path/'fp', tmp_path/'w8', 8, batches=1)
    assert row['psnr'] == pytest.approx(row['merged_psnr'], abs=1e-3)
    text = export_run(tmp_path/'w8')
    assert 'equals the integer reference' in text and 'dB in integers' in text
    integer = json.loads((tmp_path/'w8'/'results.json').read_text())[0]['integer_psnr']
    assert abs(integer - np.mean(list(row['psnr'].values()))) < 1
    assert 'backbone.0.conv' in report_run(tmp_path/'w8', alone=True)

class Heads(torch.nn.Module):
    "Two results, as a detector has them"
    def __init__(self):
        super().__init__()
        self.body, self.maps, self.scores = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3), torch.nn.Linear(8, 5)
    def forward(self, x):
        x = self.body(x).relu()
        return dict(maps=self.maps(x), scores=self.scores(x.mean((2, 3))))

@pytest.mark.parametrize('ending, package', [('.onnx', 'onnxruntime'), ('.tflite', 'ai_edge_litert'), ('.qonnx', 'qonnx')])
def test_files_of_several_outputs_are_compared(ending, package, tmp_path, capsys):
    pytest.importorskip(package)
    x = torch.randn(2, 3, 12, 12)
    q = calibrate(quantize(Heads(), 8, 8, verbose=False), [x]).eval()
    export_model(q, tmp_path/f'net{ending}', x)
    assert f'equals the integer reference in all {2*(4*10*10 + 5)} values' in capsys.readouterr().out

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('trained')/'fp'
    train(get_recipe('repvgg_a0_tiny', 'repq-bn', data='digits', epochs=8), path, timing=0)
    return path

@pytest.mark.parametrize('bits', [4, 3])
def test_without_training_low_bits_keep_what_they_can(trained, tmp_path, bits):
    "Moments and grids are in the network, in its files and in what is said of them; MinError alone is far below"
    row, alone = (post_training(trained, tmp_path/n, bits, as_published=n == 'alone') for n in ('ptq', 'alone'))
    assert row['accuracy'] > alone['accuracy'] + .1 and row['accuracy'] == row['merged_accuracy']
    assert row['size_bytes'] < 1.5*alone['size_bytes']
    recipe, model, _ = load_run(tmp_path/'ptq')
    assert recipe.norm_after and recipe.centred and recipe.peel and not load_run(tmp_path/'alone')[0].norm_after
    said = export_run(tmp_path/'ptq')
    assert 'equals the integer reference in all 640 values' in said

def test_without_training_eight_bits_keep_their_grid(trained, tmp_path):
    post_training(trained, tmp_path/'ptq', 8)
    recipe = load_run(tmp_path/'ptq')[0]
    assert recipe.norm_after and not (recipe.centred or recipe.peel or recipe.input_noise)

def test_without_training_by_command(trained, tmp_path):
    from typer.testing import CliRunner
    from repq.cli import app
    run = lambda out, *a: CliRunner().invoke(app, ['quantize', str(trained), '--ptq', '--weight-bits', '3', '--out', str(tmp_path/out), *a])
    for out, more in ('ours', []), ('alone', ['--as-published']):
        assert run(out, *more).exit_code == 0
    a, b = (json.loads((tmp_path/n/'results.json').read_text())[0]['accuracy'] for n in ('ours', 'alone'))
    assert a > b

def test_plain_networks_have_their_norms_already(tmp_path):
    train(get_recipe('resnet18_tiny', 'plain', data='digits', epochs=1), tmp_path/'fp', timing=0)
    post_training(tmp_path/'fp', tmp_path/'ptq', 8)
    assert not load_run(tmp_path/'ptq')[0].norm_after
