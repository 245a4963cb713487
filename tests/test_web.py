"In a browser: onnxruntime-web's wasm computes the reference, bit for bit. Needs node and the package: REPQ_ORT_WEB=FOLDER/node_modules after `npm install onnxruntime-web` in FOLDER."
import json, os, shutil, subprocess
from pathlib import Path
import numpy as np, pytest, torch, torchvision
from conftest import ROOT
from helpers import randomize
from repq.export import to_onnx
from repq.models import create_model
from repq.surgery import calibrate, quantize

SCRIPT = """
import {createRequire} from 'module'; import fs from 'fs'
const [packages, folder] = process.argv.slice(2), ort = createRequire(packages + '/x.js')('onnxruntime-web')
ort.env.wasm.numThreads = 1; ort.env.logLevel = 'error'
for (const {name, shape} of JSON.parse(fs.readFileSync(folder + '/cases.json'))) {
  const bytes = fs.readFileSync(`${folder}/${name}.in`)
  const x = new ort.Tensor('float32', new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)), shape)
  const session = await ort.InferenceSession.create(`${folder}/${name}.onnx`, {executionProviders: ['wasm']})
  const y = (await session.run({[session.inputNames[0]]: x}))[session.outputNames[0]].data
  fs.writeFileSync(`${folder}/${name}.out`, new Uint8Array(y.buffer, y.byteOffset, y.byteLength))
}
"""

@pytest.fixture(scope='session')
def packages():
    path = Path(os.environ.get('REPQ_ORT_WEB') or ROOT/'node_modules')
    if not shutil.which('node'): pytest.skip('no node')
    if not (path/'onnxruntime-web').is_dir(): pytest.skip(f'no onnxruntime-web in {path}: set REPQ_ORT_WEB')
    return path.resolve()

def networks(bits):
    for name in 'repvgg_a0_tiny', 'ac_resnet18_tiny', 'mobileone_s0_tiny', 'ecbsr_m4c8': yield name, create_model(name, in_channels=1, **({} if 'sr' in name else dict(num_classes=10))), torch.rand(16, 1, 16, 16)
    for name in 'resnet18', 'mobilenet_v2': yield name, randomize(getattr(torchvision.models, name)(num_classes=7)), torch.randn(4, 3, 32, 32)

@pytest.mark.parametrize('bits', [8, 4, 2])
def test_wasm_equals_reference(packages, bits, tmp_path):
    cases, want = [], {}
    for name, net, x in networks(bits):
        q = calibrate(quantize(net, bits, bits, verbose=False), [x])
        for profile in 'integers', 'vnni':
            case = f'{name}-{profile}'
            want[case] = to_onnx(q, tmp_path/f'{case}.onnx', x, profile)(x).contiguous().numpy()
            x.numpy().astype('<f4').tofile(tmp_path/f'{case}.in')
            cases.append(dict(name=case, shape=list(x.shape)))
    (tmp_path/'cases.json').write_text(json.dumps(cases))
    (tmp_path/'run.mjs').write_text(SCRIPT)
    done = subprocess.run(['node', 'run.mjs', packages, tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    differing = {n: int((np.fromfile(tmp_path/f'{n}.out', '<f4').reshape(y.shape) != y).sum()) for n, y in want.items()}
    assert not any(differing.values()), differing
