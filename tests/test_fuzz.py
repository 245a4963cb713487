"""Anything at all as options, as bytes of files and as trees of folders: no traceback, no hang, no file changed outside of --out, no exit 0 with a wrong result.
`make test` tries the same examples each time; `make fuzz` goes on with others for REPQ_FUZZ minutes (10 if it says nothing) and keeps what fails in .hypothesis."""
import functools, hashlib, json, os, shutil, signal, socket, stat, time, warnings
from contextlib import contextmanager
import pytest, torch
from hypothesis import HealthCheck, Phase, example, given, settings, strategies as st
from PIL import Image
from safetensors.torch import load, save
from typer.testing import CliRunner
import helpers # noqa: F401 (the profile of hypothesis)
from repq.cli import app
from repq.data import list_images
from repq.models import create_model
from repq.files import made_here
from repq.recipes import get_recipe
from repq.deployment import post_training
from repq.runs import load_run, train

MINUTES = float(os.environ.get('REPQ_FUZZ') or 0)
BEGAN = time.monotonic()
def enough(share): return MINUTES and time.monotonic() - BEGAN > 60*MINUTES*share

def fuzz(n, share):
    "Try a test on `n` examples, the same each time; or, for `make fuzz`, on new ones until so much of the time is over"
    if not MINUTES: return settings(max_examples=n, phases=(Phase.explicit, Phase.generate))
    some = settings(max_examples=25, derandomize=False, print_blob=True, database=settings.get_profile('default').database, suppress_health_check=list(HealthCheck))
    def decorate(test):
        test = some(test)
        @functools.wraps(test)
        def again(*args, **kw):
            while not enough(share): test(*args, **kw)
        return again
    return decorate

def ignore(done, of, values): pass

OWN = '''import sys
from torch import nn
def make(num_classes=10, in_channels=1):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
def ends(): sys.exit(0)
def fails(): raise KeyError('x\\ny')
def five(): return make(5)
def other(num_classes=10): return nn.LSTM(8, num_classes)
def empty(): return nn.Sequential()
def nan():
    model = make()
    nn.init.constant_(model[0].weight, float('nan'))
    return model
class Pair(nn.Module):
    def __init__(self): super().__init__(); self.net = make()
    def forward(self, x): return (self.net(x),)*2
class Half(nn.Module):
    def __init__(self): super().__init__(); self.net = make().half()
    def forward(self, x): return self.net(x.half())
def block(*args, **kwargs):
    from repq.blocks import ACBlock
    return ACBlock(*args, **kwargs)
'''

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A folder with what commands take: runs of both stages, one that was interrupted, images, shards, a checkpoint, figures of others, and files of somebody else"
    d, n = tmp_path_factory.mktemp('world'), torch.get_num_threads()
    torch.set_num_threads(1)
    old, os.environ['REPQ_CACHE'] = os.environ.get('REPQ_CACHE'), str(tmp_path_factory.mktemp('cache'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        train(get_recipe('repvgg_a0_tiny', 'repq-bn', epochs=1, batch_size=240), d/'fp', on_epoch=ignore, timing=0)
        post_training(d/'fp', d/'w4', 4, batches=1)
        def cut(done, of, values):
            if done >= 1: raise RuntimeError('cut')
        with pytest.raises(RuntimeError, match='cut'): train(get_recipe('repvgg_a0_tiny', 'repq-bn', epochs=2, batch_size=240), d/'cut', on_epoch=cut, timing=0, minutes=0)
    for split in 'train', 'val':
        for c in 'ab':
            (d/'images'/split/c).mkdir(parents=True)
            for i in range(6): Image.new('RGB', (12, 12), (i*20, 90, 200 if c == 'a' else 20)).save(d/'images'/split/c/f'{i}.png')
    run(d, 'shard', 'images', 'shards')
    shutil.copy(d/'fp'/'model.safetensors', d/'checkpoint.safetensors')
    Image.new('RGB', (20, 30), 'red').save(d/'photo.png')
    (d/'paper.csv').write_text('method,weight_bits,accuracy\nrepq-bn,32,90\nmerged,4,88.5\n')
    (d/'own.py').write_text(OWN); torch.save(create_model(str(d/'own.py:make'), 10, 1).state_dict(), d/'own.pth')
    (d/'theirs').mkdir(); (d/'theirs'/'notes.txt').write_text('of somebody'); (d/'theirs.json').write_text('{"of": "somebody"}'); (d/'theirs.part').mkdir(); (d/'theirs.part'/'thesis.tex').write_text('years of work')
    yield d
    torch.set_num_threads(n)
    if old is not None: os.environ['REPQ_CACHE'] = old

class Hang(BaseException): "Nothing that a command could take for an error of its own"

@contextmanager
def at_most(seconds):
    late = []
    def ring(*a): late.append(Hang(f'not done after {seconds} s')); raise late[0]
    old = signal.signal(signal.SIGALRM, ring); signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, old)
    if late: raise late[0] # a command takes it for an error of a network's code

def run(folder, *args) -> tuple: # exit code, what was said
    "A command in this process, in `folder`; an error of another kind than those that are meant for people fails"
    home = os.getcwd()
    os.chdir(folder)
    try:
        with at_most(120), warnings.catch_warnings(): warnings.simplefilter('ignore'); res = CliRunner().invoke(app, [str(a) for a in args])
    finally: os.chdir(home)
    e = res.exception
    if e is None or isinstance(e, SystemExit): return res.exit_code, res.output
    if not isinstance(e, (ValueError, OSError, FloatingPointError, ImportError)): raise AssertionError(f'{" ".join(map(str, args))}: {type(e).__name__}: {e}') from e
    assert str(e).strip() and '\n' not in str(e), f'not one line: {e!r}'
    return 1, f'{type(e).__name__}: {e}'

def seen(folder) -> dict:
    "What is in a folder: path -> kind, and content of files"
    def one(p):
        mode = p.lstat().st_mode
        if stat.S_ISLNK(mode): return os.readlink(p)
        return hashlib.sha256(p.read_bytes()).hexdigest() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return {str(p.relative_to(folder)): one(p) for p in sorted(folder.rglob('*'))}

def check(folder, before, out, code, said):
    "Nothing but `out` has changed, and after an error nothing is there that was not"
    after = seen(folder)
    ours = lambda p: out is not None and (p == out or p.startswith(f'{out}/'))
    changed = sorted(p for p in before | after if before.get(p) != after.get(p))
    wrong = [p for p in changed if (not (code == 0 and ours(p)) or p in before) and not (code == 0 and p == 'w4/results.json')] # where export notes what its integers reach
    assert not wrong, f'changed: {wrong}; it said: {said}'

# Options

NUMBERS = st.sampled_from(['0', '-1', '1', '2', '3', '4', '8', '17', '31', '32', '33', '64', 'nan', 'inf', '-inf', '1e308', '1e-320', '2.5', '', ' ', 'four', '0x10', '1_000', str(2**63 - 1), str(2**63), '9'*30, '٣'])
PLACES = st.sampled_from(['new', 'new.onnx', 'new.json', 'a/b/new', '.', '..', '', '/', 'theirs', 'theirs.json', 'theirs.part', 'theirs.json/x', 'fp', 'w4', 'cut', 'cut.part', 'fp/model.safetensors', 'w4/results.json', 'x'*300, 'photo.png', '/dev/null', '/proc/new', 'neu ü/x', '-'])
WORDS = st.sampled_from(['', 'zzz', 'plain', 'repq-bn', 'None', 'stem.conv=4,stem.conv=8', 'stem.conv=4', 'stem.konv=4', '=', 'a=b=c', 'lr=nan', 'lr=1e400', 'epochs=1', 'model=3', 'layer_bits={}', 'size=1', '('*500, 'cuda', 'cuda:99', 'cpu:x', 'onnx', 'pt2', 'safetensors'])
MODELS = st.sampled_from([*(f'own.py:{n}' for n in 'make make make ends fails five other empty nan Pair Half block sys nn zzz'.split()), 'own.py', 'own:make', 'theirs.json:make', 'gone.py:make', 'theirs:make', 'no.such:make', 'torchvision:', 'torchvision:resnet', 'torchvision:fcn_resnet50', 'timm:', ':', 'sys:exit', 'builtins:print', 'torch.nn:Identity', 'torch.nn:Conv2d', 'repvgg_a0_tiny', 'resnet18_tiny', 'ecbsr_m4c8', '', 'x'*300, '-', 'fp'])
BLOCKS = st.sampled_from(['ACBlock', 'RepVGGBlock', 'DiverseBranchBlock', 'MobileOneBlock', 'QARepVGGBlock', 'RepSRBlock', 'OREPA', 'OREPALargeKernel', 'ECB', 'acblock', '', 'own.py:block', 'own.py:make', 'own.py:ends', 'own.py:zzz', 'sys:exit', 'torch.nn:Conv2d', 'timm:resnet18', 'theirs.json:x'])
COMMANDS = [ # what every example has, the name of its output, options that it may have
    ('train repvgg_a0_tiny --method repq-bn --dry-run', '--out', {'--epochs': NUMBERS, '--batch-size': NUMBERS, '--lr': NUMBERS, '--seed': NUMBERS, '--warmup': NUMBERS, '--valid': NUMBERS, '--image-size': NUMBERS, '--checkpoint-minutes': NUMBERS, '--keep': NUMBERS,
        '--skips': NUMBERS, '--timing': NUMBERS, '--accumulate': NUMBERS, '--set': WORDS, '--data': PLACES, '--init': PLACES, '--teacher': PLACES, '--weight-bits': NUMBERS, '--scale': NUMBERS, '--crop': NUMBERS, '--resume': None, '--weight-decay': NUMBERS, '--label-smoothing': NUMBERS}),
    ('train repvgg_a0_tiny --method repq-bnest --weight-bits 4 --dry-run --init fp', '--out', {'--input-bits': NUMBERS, '--first-last-bits': NUMBERS, '--layer-bits': WORDS, '--set': WORDS, '--full-precision': WORDS, '--schedule': WORDS}),
    ('quantize fp --ptq', '--out', {'--weight-bits': NUMBERS, '--input-bits': NUMBERS, '--batches': NUMBERS, '--first-last-bits': NUMBERS, '--layer-bits': WORDS}),
    ('export w4 --format safetensors', '--out', {'--overwrite': None, '--packed': None}),
    ('export w4', '--out', {'--format': WORDS, '--symmetric': None, '--packed': None, '--overwrite': None}),
    ('eval fp', None, {'--data': PLACES, '--batch-size': NUMBERS}),
    ('report fp', '--out', {'--beside': PLACES, '--overwrite': None}),
    ('convert checkpoint.safetensors', '', {'--model': WORDS, '--to': WORDS, '--deployed': None, '--overwrite': None}),
    ('convert checkpoint.safetensors --model repvgg_a0_tiny', '', {'--to': WORDS, '--deployed': None, '--overwrite': None}),
    ('shard images', '', {'--size': NUMBERS}), ('upscale photo.png', '', {'--run': PLACES, '--tile': NUMBERS}),
    ('bench train-step repvgg_a0_tiny --batch-size 2 --size 8 --rounds 1 --only repq-bn', '--json', {'--only': WORDS, '--device': WORDS, '--bits': NUMBERS, '--rounds': NUMBERS, '--size': NUMBERS}),
    ('bench peers --batch-size 1 --width 2 --depth 1 --size 4 --rounds 1 --no-compiled', '--json', {'--width': NUMBERS, '--depth': NUMBERS, '--device': WORDS, '--bits': NUMBERS, '--overwrite': None}),
    ('bench data images --images 2 --rounds 1 --size 8', '--json', {'--workers': st.sampled_from(['-1', '0', 'nan']), '--batch-size': NUMBERS, '--shards': PLACES}),
    ('recipes ecbsr', None, {'--images-per-second': NUMBERS}),
    ('train MODEL --data digits --epochs 1 --batch-size 240 --dry-run --method repq-bn', '--out', {'--method': WORDS, '--block': BLOCKS, '--weights': st.sampled_from(['own.pth', 'checkpoint.safetensors', 'photo.png', 'fp', 'theirs', '/dev/null', 'gone', '']), '--init': PLACES, '--teacher': PLACES, '--capture': None, '--recompute': None, '--as-published': None, '--per-tensor': None, '--full-precision': WORDS, '--image-size': NUMBERS, '--layer-bits': WORDS, '--set': WORDS, '--tensorboard': None}),
    ('train MODEL --data digits --epochs 1 --batch-size 240 --dry-run --method repq-bn --block ACBlock --weight-bits 4 --weights own.pth', '--out', {'--method': WORDS, '--block': BLOCKS, '--weight-bits': NUMBERS, '--input-bits': NUMBERS, '--capture': None, '--recompute': None, '--as-published': None, '--layer-bits': st.sampled_from(['0=4', '3=2/8', '9=4', '=', '7=16', '0=0', '0=32', 'stem.conv=4']), '--first-last-bits': NUMBERS}),
    ('quantize MODEL --weights own.pth --data digits --ptq --batches 1', '--out', {'--block': BLOCKS, '--weights': st.sampled_from(['own.pth', 'checkpoint.safetensors', 'photo.png', 'fp', 'theirs', '/dev/null', 'gone']), '--model': WORDS, '--data': PLACES, '--weight-bits': NUMBERS, '--layer-bits': WORDS}),
    ('bench train-step MODEL --batch-size 2 --size 8 --rounds 1 --only plain', '--json', {'--block': BLOCKS, '--official': PLACES, '--only': WORDS}),
    ('bench inference MODEL --size 8 --rounds 1', '--json', {'--bits': NUMBERS, '--size': NUMBERS, '--batch-size': NUMBERS}),
    ('bench coverage torchvision:alexnet --timeout .01', '--json', {'--size': NUMBERS, '--bits': NUMBERS, '--timeout': st.sampled_from(['0', '-1', 'nan', 'inf', '1e308', '.02', ''])}),
    ('bench verbs --rounds 0', '--json', {'--rounds': st.sampled_from(['0', '-1', 'nan', '1001', '9'*30, ''])}), ('bench threads --rounds 0', '--json', {'--rounds': st.sampled_from(['0', '-1', 'nan', '1001', '9'*30, ''])})]

SEVERAL = ('--set', '--only') # options that may come more than once

@st.composite
def commands(draw):
    base, out, options = draw(st.sampled_from(COMMANDS))
    args, place = [draw(MODELS) if w == 'MODEL' else w for w in base.split()], None
    if out is not None:
        place = draw(PLACES if draw(st.booleans()) else st.sampled_from(['new', 'new.onnx', 'new.safetensors', 'new.json', 'new.png']))
        args += [out, place] if out else [place]
    for o in draw(st.lists(st.sampled_from(sorted(options)), max_size=2, unique=True)):
        if o in args and o not in SEVERAL: del args[args.index(o):args.index(o) + 2] # what every example has, replaced
        args += [o] if options[o] is None else [o, draw(options[o])]
    valued = sorted(o for o in options if options[o] is not None)
    if valued and draw(st.integers(0, 9)) == 0: # twice, or also as a field of the recipe
        o = draw(st.sampled_from(valued))
        args += [o, draw(options[o]), o, draw(options[o])] if args[0] != 'train' or draw(st.booleans()) or o == '--set' else [o, draw(options[o]), '--set', f'{o[2:].replace("-", "_")}={draw(options[o])}']
    return args, place

@fuzz(60, .4)
@example((['quantize', 'fp', '--ptq', '--out', 'new', '--input-bits', '0'], 'new'))
@example((['quantize', 'fp', '--ptq', '--out', 'theirs', '--weight-bits', '4'], 'theirs'))
@example((['train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--dry-run', '--out', 'new', '--checkpoint-minutes', 'nan'], 'new'))
@example((['export', 'w4', '--format', 'safetensors', '--out', 'w4/model.safetensors'], 'w4/model.safetensors'))
@example((['train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--dry-run', '--out', 'new', '--epochs', '3', '--set', 'epochs=5'], 'new'))
@given(commands())
def test_options(world, command):
    args, place = command
    before = seen(world)
    code, said = run(world, *args)
    check(world, before, place and os.path.normpath(place).split('/')[0], code, said)
    if code == 0: assert not given_twice(args), f'an option that came twice was taken: {args}'
    if code == 0: assert not {'own.py:ends', 'own.py:fails', 'own.py:zzz', 'sys:exit'} & set(args), f'code that fails was taken: {args}'
    if code == 0 and '--dry-run' not in args: right_result(world, args, place)
    for p in set(seen(world)) - set(before):
        f = world/p.split('/')[0]
        if f.exists(): shutil.rmtree(f) if f.is_dir() else f.unlink()

def given_twice(args) -> bool:
    "Does an option come twice, or as a field as well?"
    names = [a[2:].replace('-', '_') for a in args if a.startswith('--') and a not in SEVERAL] + [b.partition('=')[0].strip() for a, b in zip(args, args[1:]) if a == '--set']
    return len(names) > len(set(names))

def right_result(world, args, place):
    "What an exit code of 0 claims to have made is there, and is what was asked for"
    value = lambda o: next((args[i + 1] for i, a in enumerate(args) if a == o), None)
    for o in '--weight-bits', '--input-bits', '--batches', '--lr', '--batch-size', '--width', '--rounds', '--tile':
        v = value(o)
        assert v is None or float(v) > 0 and float(v) < 1e18, f'{o} {v} was accepted'
    if args[0] == 'quantize':
        recipe, _, info = load_run(world/place)
        assert recipe.weight_bits == int(value('--weight-bits') or 8) and recipe.input_bits == int(value('--input-bits') or recipe.weight_bits)
    elif args[0] in ('export', 'convert') or '--json' in args: assert made_here(world/place), f'{place} does not say who made it'

# Bytes of files

ODD = st.sampled_from([None, True, -1, 0, 3, 10**12, 2**70, 1.5, float('nan'), float('inf'), 'text', '', [], [None], {}, {'a': 1}, [[1]*3]*3, '\ud800', '../../x'])

def spoiled_json(data, draw):
    "The JSON with one value replaced or taken away"
    value = json.loads(data)
    def places(v, path=()):
        yield path
        for k, o in v.items() if isinstance(v, dict) else enumerate(v[:4]) if isinstance(v, list) else (): yield from places(o, (*path, k))
    *way, last = draw(st.sampled_from([p for p in places(value) if p]))
    inner = value
    for k in way: inner = inner[k]
    if draw(st.booleans()): inner[last] = draw(ODD)
    else: del inner[last]
    return json.dumps(value).encode()

def spoiled_state(data, draw):
    "A checkpoint that can be read, and is another dictionary"
    import io
    state = torch.load(io.BytesIO(data), weights_only=True)
    key = draw(st.sampled_from(sorted(state)))
    change = draw(st.sampled_from(['odd', 'gone', 'inside', 'nan']))
    if change == 'gone': del state[key]
    elif change == 'inside' and isinstance(state[key], dict): state[key].pop(draw(st.sampled_from(sorted(state[key]))))
    elif change == 'nan': next(iter(state['model'].values())).fill_(float('nan'))
    else: state[key] = draw(ODD.filter(lambda v: v != '\ud800'))
    torch.save(state, out := io.BytesIO())
    return out.getvalue()

SPOILS = dict(nan=lambda t: t.float().fill_(float('nan')), inf=lambda t: t.float().fill_(-float('inf')), int8=lambda t: t.to(torch.int8), int64=lambda t: t.round().long(), complex=lambda t: t.to(torch.complex64), shape=lambda t: t[None], scalar=lambda t: t.flatten()[0].clone(), huge=lambda t: t.double().fill_(1e300), bool=lambda t: t > 0)

def spoiled_weights(data, draw):
    "Weights of which one tensor holds what no network can have"
    tensors = load(data)
    name = draw(st.sampled_from(sorted(n for n, t in tensors.items() if t.is_floating_point() and t.ndim)))
    return save({**tensors, name: SPOILS[draw(st.sampled_from(sorted(SPOILS)))](tensors[name])})

def put(file, draw):
    "Something else in the place of a file: what was done"
    kind, data = draw(st.sampled_from(['cut', 'flip', 'junk', 'empty', 'deep', 'json', 'json', 'json', 'pipe', 'folder', 'loop', 'zero', 'gone', 'more', *['weights']*8*(file.suffix == '.safetensors')])), file.read_bytes()
    file.unlink()
    if kind == 'weights': file.write_bytes(spoiled_weights(data, draw))
    elif kind == 'cut': file.write_bytes(data[:draw(st.integers(0, max(0, len(data) - 1)))])
    elif kind == 'flip':
        data = bytearray(data)
        for _ in range(draw(st.integers(1, 5))): data[draw(st.integers(0, min(len(data) - 1, 3000)))] = draw(st.integers(0, 255))
        file.write_bytes(data)
    elif kind == 'junk': file.write_bytes(draw(st.binary(max_size=300)))
    elif kind == 'deep': file.write_bytes(b'[{"a":'*100_000)
    elif kind == 'json': file.write_bytes(spoiled_json(data, draw) if file.suffix == '.json' else spoiled_state(data, draw) if file.suffix == '.pt' else data.replace(draw(st.sampled_from([b',', b'0', b'1', b'.', b'a', b'\n'])), draw(st.sampled_from([b'', b'nan', b'\0', b'"', b'-9', b'1e999'])), 3))
    elif kind == 'pipe': os.mkfifo(file)
    elif kind == 'folder': file.mkdir()
    elif kind == 'loop': file.symlink_to(file.name)
    elif kind == 'zero': file.symlink_to('/dev/zero')
    elif kind == 'more': file.write_bytes(data + b'\n{"a": [1,2\0')
    elif kind == 'empty': file.write_bytes(b'')
    return kind

FILES = [('fp/recipe.json', 'eval fp'), ('fp/recipe.json', 'quantize fp --ptq --out new'), ('fp/results.json', 'report fp'), ('fp/history.csv', 'report fp --out new'), ('fp/model.safetensors', 'eval fp'), ('w4/recipe.json', 'export w4 --format safetensors --out new.safetensors'),
         ('w4/model.safetensors', 'export w4 --format safetensors --out new.safetensors'), ('w4/results.json', 'report fp w4'), ('paper.csv', 'report fp --beside paper.csv'), ('shards/index.json', 'train repvgg_a0_tiny --method repq-bn --batch-size 4 --data shards --dry-run --out new'),
         ('shards/train-000000.tar', 'train repvgg_a0_tiny --method repq-bn --batch-size 4 --data shards --dry-run --out new'), ('checkpoint.safetensors', 'convert checkpoint.safetensors new.pth --model repvgg_a0_tiny'), ('images/train/a/3.png', 'shard images new'),
         ('cut.part/recipe.json', 'train repvgg_a0_tiny --method repq-bn --epochs 2 --batch-size 240 --resume --dry-run --out cut'), ('cut.part/checkpoints/step-0000000006.pt', 'train repvgg_a0_tiny --method repq-bn --epochs 2 --batch-size 240 --resume --dry-run --out cut'),
         ('photo.png', 'upscale photo.png new.png --run fp'), ('fp/model.safetensors', 'train repvgg_a0_tiny --method repq-bn --weight-bits 4 --init fp --dry-run --out new'), ('fp/model.safetensors', 'train repvgg_a0_tiny --method repq-bn --teacher fp --dry-run --out new'), ('fp/model.safetensors', 'quantize fp --ptq --out new'), ('w4/model.safetensors', 'report w4 --no-alone')]

@fuzz(70, .8)
@given(st.data())
def test_bytes_of_files(world, tmp_path_factory, data):
    name, command = data.draw(st.sampled_from(FILES))
    d = tmp_path_factory.mktemp('copy')/'world'
    shutil.copytree(world, d)
    # another folder each time is another cache, but for the time of change of its files
    kind = put(d/name, data.draw)
    before = seen(d)
    code, said = run(d, *command.split())
    new = next((w for w in command.split() if w.startswith('new')), None)
    check(d, before, new, code, said)
    if kind in ('pipe', 'folder', 'loop', 'zero', 'gone', 'deep', 'empty', 'weights') and not name.startswith(('images', 'cut.part/checkpoints', 'shards/index')) : assert code == 1, f'{name}, {kind}: {said}'
    if code == 0 and command.startswith('eval') and 'json' in name: assert 'accuracy' in said
    shutil.rmtree(d.parent)

# Trees of folders

KINDS = ['image']*6 + ['damaged', 'claims', 'empty', 'text', 'pipe', 'socket', 'nowhere', 'self', 'up', 'sibling', 'hidden', 'folder', 'device']

def grow(root, kinds, counter):
    "Things of these kinds in the folders of two classes; how many images and readable ones there are"
    images = 0
    for split in 'train', 'val':
        for c in 'ab':
            d = root/split/c; d.mkdir(parents=True)
            for _ in range(12): Image.new('RGB', (12, 12), (next(counter) % 250, 90, 9)).save(d/f'ok{next(counter)}.png'); images += 1
    for split, c, kind in kinds:
        d, n = root/split/c, f'{kind}{next(counter)}.png'
        if kind == 'image': Image.new('RGB', (12, 12)).save(d/n); images += 1
        elif kind == 'damaged': (d/n).write_bytes(b'\x89PNG\r\n\x1a\n junk'); images += 1
        elif kind == 'claims': (d/n).write_bytes(b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR' + (12000).to_bytes(4, 'big')*2 + b'\x08\x02\0\0\0'); images += 1
        elif kind == 'empty': (d/n).write_bytes(b''); images += 1
        elif kind == 'text': (d/f'{n}.txt').write_text('notes')
        elif kind == 'pipe': os.mkfifo(d/n)
        elif kind == 'socket':
            home = os.getcwd(); os.chdir(d) # a socket's path is short
            try: s = socket.socket(socket.AF_UNIX); s.bind(n); s.close()
            finally: os.chdir(home)
        elif kind == 'nowhere': (d/n).symlink_to('nowhere.png'); images += 1
        elif kind == 'self': (d/n).symlink_to(n); images += 1
        elif kind == 'up': (d/f'{kind}{next(counter)}').symlink_to(draw_up(counter), target_is_directory=True)
        elif kind == 'sibling': (d/f'{kind}{next(counter)}').symlink_to('../a' if c == 'b' else '../b', target_is_directory=True)
        elif kind == 'hidden': (d/f'.{n}').write_bytes(b'x')
        elif kind == 'folder': (d/n).mkdir()
        elif kind == 'device': (d/n).symlink_to('/dev/zero')
    return images

def draw_up(counter): return ['.', '..', '../..', '/'][next(counter) % 4]

@fuzz(12, 1.)
@given(st.lists(st.tuples(st.sampled_from(['train', 'val']), st.sampled_from('ab'), st.sampled_from(KINDS)), max_size=6))
def test_trees_of_folders(tmp_path_factory, world, kinds):
    d = tmp_path_factory.mktemp('tree')
    images = grow(d/'data', kinds, iter(range(10**6)))
    before = seen(d)
    with at_most(60), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert sum(len(list_images(d/'data'/s)[0]) for s in ('train', 'val')) == images, 'each image once'
    code, said = run(d, 'train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--batch-size', '4', '--data', 'data', '--out', 'new', '--dry-run')
    check(d, before, None, code, said)
    bad = max((sum(1 for s, _, k in kinds if s == split and k in ('damaged', 'claims', 'empty', 'nowhere', 'self'))) for split in ('train', 'val'))
    if bad <= 2: assert code == 0 and '3×12×12' in said, f'the size is that of the images: {said}'
    shutil.rmtree(d)
