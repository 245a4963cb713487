"Networks from elsewhere: names, code of the user's own, weights, blocks, and the runs that remember them."
import io, json, os, re, shlex, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from torch import nn
from typer.testing import CliRunner
from helpers import KW
import repq
from repq.blocks import Block
from repq.cli import app
from repq.commands.app import Interrupted
from repq.deployment import export_run, post_training, report_run
from repq.layers import RepQLayer
from repq.recipes import build, get_recipe
from repq.runs import eval_run, load_run, train

ROOT = Path(__file__).resolve().parent.parent
CODE = '''
from torch import nn
def make(num_classes=10, in_channels=1):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, bias=False),
                         nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
def five(): return make(5)
def tuples():
    class Pair(nn.Sequential):
        def forward(self, x): return (super().forward(x),)*2
    return Pair(*make())
def nothing(): pass
def bare(num_classes=10): return nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
'''
TINY = dict(data='digits', epochs=1, batch_size=240)

@pytest.fixture
def own(tmp_path, monkeypatch):
    "A file of one's own in the working directory, its name"
    monkeypatch.chdir(tmp_path)
    Path('own.py').write_text(CODE)
    return 'own.py:make'

def said(*args):
    "The error of a command, in a line"
    res = CliRunner().invoke(app, [str(a) for a in args])
    assert isinstance(res.exception, (ValueError, OSError, ImportError)), res.output
    return str(res.exception)

def test_run_remembers(own, monkeypatch, tmp_path):
    "Trained, resumed, evaluated and exported, from another folder as well."
    fp, w4 = (get_recipe(own, m, b, block='ACBlock', **TINY) for m, b in (('repq-bn', 32), ('repq-bnest', 4)))
    assert fp.model == f'{tmp_path}/own.py:make'
    train(fp, 'fp', **KW)
    row = train(w4, 'w4', init='fp', **KW)
    assert train(w4, 'w4', init='fp', resume=True, **KW) == row
    info = json.loads(Path('w4/recipe.json').read_text())
    assert (info['recipe']['block'], info['code']['file']) == ('ACBlock', f'{tmp_path}/own.py')
    monkeypatch.chdir('/')
    assert eval_run(tmp_path/'w4')['accuracy'] == row['accuracy']
    pytest.importorskip('onnxruntime')
    assert 'equals the integer reference' in export_run(tmp_path/'w4', score=False)

def test_network_without_buffers(own):
    "No norm, nothing that a skipped step would have to put back"
    row = train(get_recipe('own.py:bare', 'plain', 32, **TINY), 'bare', **KW)
    assert 0 <= row['accuracy'] <= 1

def test_run_of_other_code(own, tmp_path):
    "A run folder that names other code than made it doesn't run it; what has changed is said."
    train(get_recipe(own, 'plain', **TINY), 'fp', **KW)
    Path('own.py').write_text(CODE + '# changed')
    with pytest.warns(UserWarning, match='own.py has changed since'): load_run('fp')
    info = json.loads(Path('fp/recipe.json').read_text())
    Path('evil.py').write_text('open("ran", "w")\n' + CODE)
    for code in None, info['code'], dict(info['code'], file='/elsewhere/evil.py'):
        bad = info | dict(recipe=info['recipe'] | dict(model=f'{tmp_path}/evil.py:make'), code=code)
        Path('fp/recipe.json').write_text(json.dumps({k: v for k, v in bad.items() if v is not None}))
        with pytest.raises(ValueError, match='it is not run'): load_run('fp')
    assert not Path('ran').exists()

@pytest.mark.parametrize('bits', [32, 4])
def test_weights_come_before_blocks(own, bits):
    "What the network computes with them, blocks or not."
    torch.manual_seed(1)
    net = repq.create_model(own, 10, 1).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(); m.running_var.uniform_(.5, 2); m.weight.data.uniform_(.5, 1.5)
    x = torch.randn(4, 1, 8, 8)
    for method, block in ('repq-bn', 'RepVGGBlock'), ('plain', None):
        model = build(get_recipe(own, method, bits, block=block, **TINY), 10, 1, net.state_dict()).eval()
        with torch.no_grad(), repq.surgery.unquantized(model): torch.testing.assert_close(model(x), net(x), rtol=1e-3, atol=1e-4)

def test_weights_of_other_classes(own):
    "A new head where training follows, an error where none does."
    state = repq.create_model(own, 7, 1).state_dict()
    with pytest.warns(UserWarning, match="have 7 classes in '8', the data of .* 10: this layer begins anew"): model = build(get_recipe(own, 'plain', **TINY), 10, 1, state)
    assert torch.equal(model[0].weight, state['0.weight']) and model[8].weight.shape == (10, 16)
    with pytest.raises(ValueError, match='train in full precision first'): build(get_recipe(own, 'plain', 4, **TINY), 10, 1, state)
    with pytest.raises(ValueError, match='the checkpoint is not of .*unexpected: more'): build(get_recipe(own, 'plain', **TINY), 10, 1, state | dict(more=state['0.weight']))

def test_post_training(own):
    torch.save(repq.create_model(own, 10, 1).state_dict(), 'w.pth')
    for block, method in (None, 'plain'), ('RepVGGBlock', 'merged'):
        row = post_training('w.pth', f'ptq-{method}', model=own, data='digits', block=block, batches=1)
        assert row['method'] == method and load_run(f'ptq-{method}')[0].block == block
    torch.save(dict(w=print), 'code.pth')
    with pytest.raises(ValueError, match='cannot be read as tensors'): post_training('code.pth', 'x', model=own, data='digits')

@pytest.mark.parametrize('name, says', [
    ('own.py:mak', 'did you mean make'), ('folder.py:make', 'folder.py is a folder or a device, not a file'), ('owned.py:make', 'did you mean own.py'), ('own.py', 'own.py:function'), ('no.such:make', 'there is no module no'),
    ('own.py:five', '5\\) for 4 images, the data has 10 classes'), ('own.py:tuples', 'gives a tuple'), ('own.py:nothing', 'gave nothing, not a torch.nn.Module'),
    ('torchvision:resnet81', 'did you mean resnet18'), ('torchvision:resnet18', 'take 3 channels, the images have 1'), ('torchvision:fcn_resnet50', 'no classifier')])
def test_wrong_names(own, name, says):
    Path('folder.py').mkdir()
    with pytest.raises((ValueError, OSError), match=says): train(get_recipe(name, 'plain', **TINY), 'x', **KW)
    assert not Path('x').exists() and not Path('x.part').exists()

TIED = CODE + '''
class Tied(nn.Module):
    def __init__(self, num_classes=10): super().__init__(); self.net = make(num_classes); self.again = self.net[3]
    def forward(self, x): return self.net(x)
class Frozen(Tied):
    def forward(self, x): return super().forward(x).detach()
class Several(Tied):
    def forward(self, x): return (super().forward(x),)*2 if self.training else super().forward(x)
class Evaluated(Tied):
    def forward(self, x):
        assert not self.training, 'only in evaluation mode'
        return super().forward(x)
'''

def test_tied_weights_are_written(own):
    "As copies: nothing is lost at the end of training, and the run is read back as it was"
    Path('own.py').write_text(TIED)
    row = train(get_recipe('own.py:Tied', 'plain', **TINY), 'fp', **KW)
    model = load_run('fp')[1]
    assert model.again is model.net[3] and eval_run('fp')['accuracy'] == row['accuracy']
    repq.write_checkpoint('w.safetensors', model.state_dict())
    assert torch.equal(repq.read_checkpoint('w.safetensors')['again.weight'], model.net[3].weight)

def test_what_cannot_train_is_said_before(own):
    Path('own.py').write_text(TIED)
    for name, says in ('Frozen', 'has no gradient'), ('Several', 'gives a tuple in training mode'), ('Evaluated', 'does not take the images of this data in training mode: .*only in evaluation mode'):
        with pytest.raises(ValueError, match=says): train(get_recipe(f'own.py:{name}', 'plain', **TINY), 'x', **KW)
    assert not Path('x').exists() and not Path('x.part').exists()

def test_benchmarks_of_code(own):
    Path('own.py').write_text(CODE + 'def colours(): return make(5, 3)\ndef script(): import torch; return torch.jit.script(make())\ndef large(): return nn.Sequential(nn.Flatten(), nn.Linear(50, 1000))\n')
    assert '(2, 5) for 2 images, the data has 1000 classes' in said('bench', 'train-step', 'own.py:colours', '--size', 8, '--batch-size', 2, '--rounds', 1, '--only', 'plain')
    assert 'does not take the images' in said('bench', 'inference', 'own.py:large', '--size', 8, '--rounds', 1)
    assert 'gave TorchScript' in said('train', 'own.py:script', '--data', 'digits', '--method', 'plain', '--out', 'x')

def test_a_network_without_buffers_trains(own):
    "No batch norm, and nothing else that is no parameter"
    Path('own.py').write_text('from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))\n')
    assert train(get_recipe(own, 'plain', **TINY), 'fp', **KW)['accuracy'] == eval_run('fp')['accuracy']

ODD = '''
import torch
class Extra(nn.Sequential):
    def __init__(self): super().__init__(*make())
    def get_extra_state(self): return {'version': 1}
    def set_extra_state(self, state): pass
class NoState(Extra):
    def state_dict(self, *args, **kwargs): raise AttributeError('two\\nlines')
class NoEval(nn.Sequential):
    def __init__(self): super().__init__(*make())
    def train(self, mode=True):
        if not mode: raise KeyError('eval')
        return super().train(mode)
class NoCopy(nn.Sequential):
    def __init__(self): super().__init__(*make())
    def __deepcopy__(self, memo): raise TypeError('no copies')
'''

@pytest.mark.parametrize('name,says', [('Extra', "state dict has '_extra_state', which is no tensor"), ('NoState', 'the state dict of .*own.py:NoState failed .AttributeError: two lines'), ('NoCopy', 'NoCopy cannot be copied: no copies')])
def test_networks_that_cannot_be_kept(own, name, says):
    Path('own.py').write_text(CODE + ODD)
    assert re.search(says, said('train', f'own.py:{name}', '--method', 'plain', '--data', 'digits', '--out', 'x')) and not Path('x.part').exists()

def test_an_error_of_the_users_code_is_told_as_theirs(own):
    Path('own.py').write_text(CODE + ODD)
    args = 'train', 'own.py:NoEval', '--method', 'plain', '--data', 'digits', '--out', 'x'
    p = subprocess.run([sys.executable, '-c', 'from repq.cli import main; main()', *args], capture_output=True, text=True)
    assert p.returncode == 1 and re.fullmatch(r"repq: .*own.py, line \d+, raised KeyError: 'eval'\n", p.stderr), p.stderr

def test_code_that_ends_the_program(own):
    "A script that reads options, or a function that gives up: an error that names it, not an exit without a word."
    Path('script.py').write_text('import sys\nsys.exit(0)\n' + CODE)
    Path('own.py').write_text(CODE + 'def ends(*args, **kw): raise SystemExit(0)\n')
    for name, says in ('script.py:make', 'script.py cannot be run \\(SystemExit'), ('script:make', 'script cannot be imported \\(SystemExit'), ('own.py:ends', 'failed \\(SystemExit: 0\\)'):
        with pytest.raises(ValueError, match=says): repq.create_model(name, 10, 1)
    text = said('train', own, '--block', 'own.py:ends', '--data', 'digits', '--out', 'x')
    assert 'code of a network ended the program (exit code 0; ' in text and 'own.py, line' in text

def test_missing_package(own, monkeypatch):
    monkeypatch.setattr('repq.networks.sources.find_spec', lambda name: None)
    with pytest.raises(ImportError, match='pip install timm'): get_recipe('timm:resnet18')

def test_command_line(own, tmp_path):
    "What belongs together and what does not."
    torch.save(repq.create_model(own, 10, 1).state_dict(), 'w.pth')
    tiny = ['--data', 'digits', '--out', 'x']
    assert 'has no blocks of its own' in said('train', own, '--epochs', 1, *tiny)
    assert "did you mean ACBlock" in said('train', own, '--block', 'ACBlok', *tiny)
    assert 'no effect' in said('train', own, '--block', 'ACBlock', '--method', 'plain', *tiny)
    assert 'block must be called as RepVGGBlock is' in said('train', own, '--block', 'torch.nn:Conv2d', '--epochs', 1, *tiny)
    assert 'sys is built into Python' in said('train', 'sys:exit', '--method', 'plain', *tiny)
    assert '--weights and --pretrained' in said('train', own, '--weights', 'w.pth', '--pretrained', *tiny)
    assert 'there is no file none.pth' in said('train', own, '--weights', 'none.pth', *tiny)
    assert 'has no pretrained weights' in said('train', own, '--pretrained', '--method', 'plain', *tiny)
    assert 'random weights' in said('quantize', own, '--ptq', *tiny)
    assert 'is it a network?' in said('export', own)
    res = CliRunner().invoke(app, ['quantize', own, '--ptq', '--weights', 'w.pth', '--batches', '1', *tiny])
    assert not res.exit_code and load_run('x')[0].method == 'plain'

def run_page(path):
    "Every code cell of a page, flagged ones too."
    names = {'__name__': 'page'}
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(c['source'])
        if c['cell_type'] == 'code' and 'nbdev_export' not in source: exec(compile(source, c['id'], 'exec'), names)

def test_timm():
    timm = pytest.importorskip('timm')
    assert timm.is_model('resnet10t')
    recipe = get_recipe('timm:resnet10t', 'plain', 4)
    assert build(recipe, 7, 1)(torch.randn(2, 1, 32, 32)).shape == (2, 7) if recipe.epochs else True
    with pytest.raises(ValueError, match='did you mean'): get_recipe('timm:resnet10tt')

def test_timm_tutorial():
    pytest.importorskip('timm'); pytest.importorskip('onnxruntime'); pytest.importorskip('repq.networks.adoption')
    threads = torch.get_num_threads()
    try: run_page(ROOT/'nbs'/'tutorials'/'timm_to_integers.ipynb')
    finally: torch.set_num_threads(threads)

# What code of others does to the process that it runs in

SPOILS = {'ends with something odd': ('raise type("Odd", (BaseException,), {})("x\\ny")', 'Odd: x y'), 'interrupts itself': ('raise KeyboardInterrupt', 'KeyboardInterrupt'), 'ends': ('sys.exit(0)', 'SystemExit: 0|exit code 0'),
          'closes stdout': ('sys.stdout.close()', 'closes sys.stdout'), 'closes stderr': ('sys.stderr.close()', 'closes sys.stderr'), 'takes stdout away': ('sys.stdout = None', 'changes sys.stdout'), 'goes elsewhere': ('os.chdir("/")', 'changes the working directory'),
          'sets the dtype': ('torch.set_default_dtype(torch.float64)', 'changes the default dtype|double'), 'sets the device': ('torch.set_default_device("meta")', 'changes the default device|device meta'), 'needs a terminal': ('input()', 'EOF')}
BACK = [(where, what) for where in ('top', 'make') for what in ('takes stdout away', 'goes elsewhere')] + [('top', 'sets the dtype'), ('top', 'sets the device')] # turned back

def spoiling(where, line):
    "A file that makes a network, with a line at the top, in the function, in the forward pass, or in that of training alone"
    at = lambda *places: line if where in places else 'pass'
    return f'''import os, sys, threading, time
import torch
from torch import nn
{at('top')}
class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    def forward(self, x):
        {at('forward')}
        if self.training: {at('training')}
        return self.net(x)
def make(num_classes=10, in_channels=1):
    {at('make')}
    return Net(num_classes, in_channels)
'''

COMMAND = 'train net.py:make --data digits --method plain --epochs 1 --batch-size 240 --timing 0 --out new --dry-run'.split()

@pytest.mark.parametrize('where', ('top', 'make', 'forward', 'training'))
@pytest.mark.parametrize('what', SPOILS)
def test_a_process_is_left_as_it_was(tmp_path, monkeypatch, where, what):
    "One line that says what it was, and nothing is written; or it is as if nothing had been changed."
    monkeypatch.chdir(tmp_path)
    line, words = SPOILS[what]
    Path('net.py').write_text(spoiling(where, line))
    monkeypatch.setattr(sys, 'stdout', out := io.StringIO())
    monkeypatch.setattr(sys, 'stderr', err := io.StringIO())
    monkeypatch.setattr(sys, 'stdin', io.StringIO())
    monkeypatch.setattr(sys, 'argv', ['repq', *COMMAND])
    with pytest.raises(BaseException) as e: app(standalone_mode=False); raise SystemExit(0)
    assert sys.stdout is out and sys.stderr is err and (Path.cwd(), torch.get_default_dtype(), torch.get_default_device().type) == (tmp_path, torch.float32, 'cpu')
    if (where, what) in BACK: assert e.type is SystemExit and 'parameters' in out.getvalue()
    elif what == 'interrupts itself': assert e.type is Interrupted # of which `run_app` makes a line
    else: assert e.type is ValueError and re.search(words, str(e.value)) and '\n' not in str(e.value)
    assert [p.name for p in tmp_path.iterdir() if p.name != '__pycache__'] == ['net.py']

@pytest.mark.parametrize('args', ['quantize fp --ptq --batches 1 --out new', 'export w4 --out new.safetensors --to safetensors', 'report w4 --no-alone --out new', 'eval fp', 'bench train-step net.py:make --size 8 --batch-size 2 --rounds 1 --only plain --json new.json'])
def test_every_command_looks_at_a_forward_pass(changing, monkeypatch, args):
    "Before it writes."
    monkeypatch.chdir(changing)
    before = sorted(p.name for p in changing.iterdir())
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); text = said(*args.split()) # the code has changed
    assert text == "Net's forward pass changes the working directory, for all of the program: a network should compute, and do nothing else"
    assert sorted(p.name for p in changing.iterdir()) == before and Path.cwd() == changing

@pytest.fixture(scope='module')
def changing(tmp_path_factory):
    "A folder with runs of a network that now goes elsewhere when it computes"
    d, home = tmp_path_factory.mktemp('changing'), os.getcwd()
    os.chdir(d)
    try:
        Path('net.py').write_text(spoiling('nowhere', ''))
        train(get_recipe('net.py:make', 'plain', **TINY), 'fp', **KW)
        post_training('fp', 'w4', 8, batches=1)
        Path('net.py').write_text(spoiling('forward', 'os.chdir("/")'))
    finally: os.chdir(home)
    return d

def test_interrupted_by_itself_beside_a_thread_that_does_not_end(tmp_path, monkeypatch):
    "An error, not an interruption, and it ends."
    monkeypatch.chdir(tmp_path)
    Path('net.py').write_text(spoiling('forward', 'raise KeyboardInterrupt').replace('class Net', 'threading.Thread(target=time.sleep, args=(10000,), name="sleeper").start()\nclass Net'))
    res = subprocess.run([sys.executable, '-m', 'repq.cli', *COMMAND], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    first, last = [l for l in res.stderr.splitlines() if l.startswith('repq: ')]
    assert res.returncode == 1 and 'ended the program (KeyboardInterrupt; ' in first and last.endswith('does not end, sleeper') and 'Traceback' not in res.stderr

@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&- >&- 2>&-'])
def test_streams_that_the_shell_closed(closed):
    assert subprocess.run(['sh', '-c', f'{shlex.quote(sys.executable)} -m repq.cli list {closed}'], env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=120).returncode == 0

BRANCHED = '''
from torch import nn
class Branches(nn.Module):
    def __init__(self, c): super().__init__(); self.a, self.b, self.na, self.nb = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c), nn.BatchNorm2d(c)
    def forward(self, x): return (self.na(self.a(x)) + self.nb(self.b(x))).relu()
def make(num_classes=10, in_channels=1):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), Branches(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
'''

def test_branches_left_apart(own):
    "--no-adopt leaves a network's own branches as they are, in training and in quantization without it, and the run remembers it"
    Path('own.py').write_text(BRANCHED)
    torch.manual_seed(0)
    torch.save(repq.create_model(own, 10, 1).state_dict(), 'w.pth')
    def made(kind, run, *args):
        res = CliRunner().invoke(app, [*map(str, args), '--data', 'digits', '--out', run])
        assert res.exit_code == 0, res.output
        recipe, model, _ = load_run(run)
        assert eval_run(run)['accuracy'] == json.loads(Path(run, 'results.json').read_text())[0]['accuracy']
        return recipe.adopt, sum(isinstance(m, kind) for m in model.modules())
    ptq, fp = ('quantize', 'w.pth', '--ptq', '--model', own), ('train', own, '--block', 'ACBlock', '--epochs', 1, '--timing', 0)
    assert made(RepQLayer, 'ptq', *ptq) == (True, 3) and made(RepQLayer, 'ptq-apart', *ptq, '--no-adopt') == (False, 4)
    assert made(Block, 'fp', *fp) == (True, 2) and made(Block, 'fp-apart', *fp, '--no-adopt') == (False, 3)
    assert 'has no blocks, and method' in said('train', own, '--method', 'repq-bn', '--data', 'digits', '--no-adopt', '--out', 'x')

def test_report_names_islands(own):
    "What stays in floating point, with its share of the time, below the layers"
    pytest.importorskip('onnxruntime')
    Path('own.py').write_text(BRANCHED)
    torch.manual_seed(0)
    torch.save(repq.create_model(own, 10, 1).state_dict(), 'w.pth')
    post_training('w.pth', 'ptq', batches=1, model=own, data='digits')
    table = report_run('ptq', 'report', alone=False)
    found = json.loads(Path('report/layers.json').read_text())['islands']
    assert re.fullmatch(r'Its ONNX file has 1 island in floating point \(1 GroupNorm\), \d+% of its time on one thread.', found)
    assert table.endswith(f'|\n\n{found}') and Path('report/layers.md').read_text().startswith(table)
