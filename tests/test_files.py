"Nothing that exists is lost: places that are taken, folders shared by two commands, full disks, files of others, kills at the end."
import json, os, resource, shutil, signal, subprocess, sys, tarfile, time, warnings
from contextlib import contextmanager
from pathlib import Path
import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from helpers import KW, TINY, cut, same_state
from repq import files
from repq.checkpoints import to_official, write_checkpoint
from repq.networks import files as network_files
from repq.networks.locks import lock_file
from repq.training import packed, run_folders as folders, runs as runs_module
from repq.cli import app
from repq.commands.app import error_line
from repq.data import list_images, read_shards
from repq.deployed import load_deployed
from repq.deployment import export_run, post_training
from repq.export import check_saturation, load_integers, onnx_session
from repq.files import SIGNATURE, locked, making, replacing, writing
from repq.models import create_model
from repq.plans import plan
from repq.recipes import get_recipe
from repq.resume import read_state
from repq.runs import eval_run, load_run, train

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A full-precision run and its quantization without training"
    d, n = tmp_path_factory.mktemp('runs'), torch.get_num_threads()
    torch.set_num_threads(1)
    train(get_recipe(**TINY), d/'fp', **KW); post_training(d/'fp', d/'w4', 4, batches=1)
    torch.set_num_threads(n)
    return d

def seen(folder): return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob('*')}
def run(*args): return CliRunner().invoke(app, [str(a) for a in args])
def shell(*args, **kw): return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', 'from repq.cli import main; main()', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **kw)

# The four ways of 0.1.0 to lose work

@pytest.mark.parametrize('name', ['model.safetensors', 'recipe.json', 'results.json', 'history.csv'])
@pytest.mark.parametrize('overwrite', [False, True])
def test_files_of_a_run_are_not_overwritten(runs, tmp_path, name, overwrite):
    shutil.copytree(runs/'fp', tmp_path/'fp')
    before = seen(tmp_path)
    extra = ['--overwrite']*overwrite
    for args in (['export', runs/'w4', '--format', 'safetensors', '--out'], ['bench', 'peers', '--json'], ['convert', runs/'fp'/'model.safetensors', '--model', 'repvgg_a0_tiny']):
        res = run(*args, tmp_path/'fp'/name, *extra)
        assert res.exit_code == 1 and seen(tmp_path) == before, (args, res.exception)
        assert 'exists' in str(res.exception) or 'belongs to the run' in str(res.exception) or 'the name must end' in str(res.exception)

def test_a_checkpoint_is_not_written_over_a_run(runs, tmp_path):
    shutil.copytree(runs/'fp', tmp_path/'fp')
    before = seen(tmp_path)
    with pytest.raises(FileExistsError, match='belongs to the run'): write_checkpoint(tmp_path/'fp'/'model.safetensors', {'a': torch.ones(2)}, overwrite=True)
    assert seen(tmp_path) == before

def test_every_export_asks(runs, tmp_path):
    for f, format, profile in (('a.onnx', 'onnx', 'packed'), ('a.safetensors', 'safetensors', 'integers'), ('a.pt2', 'pt2', 'integers')):
        def export(path, overwrite=False): return export_run(runs/'w4', path, format, profile, overwrite=overwrite)
        (tmp_path/f).write_text('theirs')
        for overwrite in False, True:
            with pytest.raises(FileExistsError, match='exists'): export(tmp_path/f, overwrite)
        assert (tmp_path/f).read_text() == 'theirs'
        (tmp_path/f).unlink(); export(tmp_path/f)
        first = (tmp_path/f).stat().st_ino
        with pytest.raises(FileExistsError, match='exists: give another name.*--overwrite'): export(tmp_path/f)
        assert (tmp_path/f).stat().st_ino == first
        export(tmp_path/f, True) # ours, and asked for
        assert (tmp_path/f).stat().st_ino != first

def test_a_demo_is_not_made_into_a_run(runs, tmp_path):
    "Its results.json would take the place of the run's"
    shutil.copytree(runs/'fp', tmp_path/'fp')
    before = seen(tmp_path)
    res = run('demo', '--quick', '--jobs', 0, '--model', 'repvgg_a0_tiny', '--out', tmp_path/'fp')
    assert res.exit_code == 1 and 'results.json belongs to the run' in str(res.exception), res.exception
    assert seen(tmp_path) == before

def test_a_remark_is_no_harm(runs, tmp_path):
    "Files that say who made them are read as before"
    assert run('convert', runs/'fp'/'model.safetensors', tmp_path/'a.pth', '--model', 'repvgg_a0_tiny').exit_code == 0
    same_state(torch.load(tmp_path/'a.pth', weights_only=True), load_file(runs/'fp'/'model.safetensors'))
    assert files.made_here(tmp_path/'a.pth') and not files.made_here(runs/'fp'/'model.safetensors')

@pytest.mark.parametrize('command', ['quantize', 'train', 'shard'])
def test_an_interrupted_training_and_folders_of_others_stay(runs, tmp_path, command):
    with pytest.raises(RuntimeError, match='cut'): train(get_recipe(**TINY), tmp_path/'x', on_epoch=cut, timing=0, minutes=0)
    (tmp_path/'theirs.part').mkdir(); (tmp_path/'theirs.part'/'thesis.tex').write_text('years')
    (tmp_path/'mixed.part').mkdir(); shutil.copy(runs/'fp'/'recipe.json', tmp_path/'mixed.part'); (tmp_path/'mixed.part'/'notes.txt').write_text('mine')
    (tmp_path/'file.part').write_text('a file'); (tmp_path/'link.part').symlink_to('theirs.part')
    shutil.copytree(runs/'fp', tmp_path/'done.part') # killed before its move, or so called by somebody
    for s in 'train', 'val': (tmp_path/'images'/s/'a').mkdir(parents=True); Image.new('RGB', (8, 8)).save(tmp_path/'images'/s/'a'/'0.png')
    before = seen(tmp_path)
    args = dict(quantize=['quantize', runs/'fp', '--ptq', '--batches', 1, '--out'], train=['train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--batch-size', 240, '--epochs', 1, '--timing', 0, '--out'], shard=['shard', tmp_path/'images'])[command]
    for name, words in dict(x='--resume', theirs='was not made by repq', mixed='notes.txt', file='no folder of repq', link='no folder of repq', done='only has to be moved').items():
        res = run(*args, tmp_path/name)
        assert res.exit_code == 1 and words in str(res.exception) and f'{name}.part' in str(res.exception), (name, res.exception)
        assert seen(tmp_path) == before, name
    res = run(*args, tmp_path/'new.part')
    assert res.exit_code == 1 and 'a name that ends in .part' in str(res.exception) and seen(tmp_path) == before

def test_a_part_that_was_killed_early_is_ours(tmp_path):
    for what in 'marker', 'empty', 'recipe':
        part = tmp_path/f'{what}.part'; part.mkdir()
        if what == 'marker': files.mark(part, 'shards'); (part/'train-000000.tar').write_bytes(b'half')
        with making(tmp_path/what, 'a test') as p: (p/'results.json').write_text('[]')
        assert [f.name for f in (tmp_path/what).iterdir()] == ['results.json']

def pack(folder, split):
    with tarfile.open(folder/f'{split}-0.tar', 'w') as t:
        for c in 'ab':
            for i in range(4): t.add(folder/'one.png', f'{c}/{i}.png')

@pytest.mark.parametrize('text', ['{"shardlist": [{"url": "train-0.tar"}]}', '[]', '3'])
def test_an_index_of_another_program_stays(tmp_path, monkeypatch, text):
    monkeypatch.setenv('REPQ_CACHE', str(tmp_path/'cache'))
    d = tmp_path/'data'; d.mkdir(); Image.new('RGB', (8, 8)).save(d/'one.png')
    for split in 'train', 'val': pack(d, split)
    (d/'one.png').unlink(); (d/'index.json').write_text(text)
    before = seen(d)
    assert [len(o[0]) for o in read_shards(d).values()] == [8, 8] and seen(d) == before
    assert '8 training' in plan(get_recipe('repvgg_a0_tiny', 'repq-bn', data=str(d), batch_size=4), tmp_path/'run') and seen(d) == before and not (tmp_path/'run.part').exists()
    kept, = (tmp_path/'cache').glob('*.index.json')
    kept.write_text('{}'); assert [len(o[0]) for o in read_shards(d).values()] == [8, 8] # damaged: made again
    (d/'val-0.tar').write_bytes((d/'val-0.tar').read_bytes()[:3000])
    with pytest.raises(ValueError, match='val-0.tar .*cut off'): read_shards(d)

# Two commands

def test_an_error_meanwhile_is_not_of_the_lock(tmp_path):
    "What is read while an output is held is named itself, and not the output"
    with pytest.raises(PermissionError, match='photo.png'), locked(tmp_path/'a'/'new'): raise PermissionError(13, 'Permission denied', 'photo.png')
    with pytest.raises(OSError, match='notes/new cannot be written') as e:
        (tmp_path/'notes').write_text('x')
        with locked(tmp_path/'notes'/'new'): pass
    assert not isinstance(e.value, NotADirectoryError) or e.value.errno is None
    assert [f.name for f in tmp_path.iterdir()] == ['notes'] # neither a lock nor the folder that was made for it

def test_a_pair_of_commands_with_one_output(tmp_path):
    "The second is refused while the first is at it, and says who; the first goes on; killed, it holds nothing"
    cmd = ('train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--batch-size', 240, '--epochs', 500, '--timing', 0, '--checkpoint-minutes', 0, '--out', tmp_path/'x')
    p = shell(*cmd)
    try:
        until = time.monotonic() + 600
        while not list(tmp_path.glob('x.part/checkpoints/step-*.pt')): assert p.poll() is None and time.monotonic() < until; time.sleep(.02)
        for args in ([*cmd, '--resume'], [*cmd[:3], 'repq-bnest', *cmd[4:]], [*cmd[:-1], tmp_path/'x.part'], [*cmd, '--dry-run', '--resume']):
            res = run(*args)
            assert res.exit_code == 1 and f'is being made by another command (process {p.pid} on ' in str(res.exception) and 'since 2' in str(res.exception) and 'repvgg_a0_tiny' in str(res.exception), res.exception
        assert p.poll() is None
    finally: p.kill(); p.communicate()
    assert 'going on at epoch' in plan(get_recipe(**{**TINY, 'epochs': 500}), tmp_path/'x', resume=True)
    with locked(tmp_path/'x'): pass
    assert not [f for f in tmp_path.iterdir() if 'lock' in f.name]

@pytest.mark.parametrize('pair', [('repq-bn', 'repq-bnest'), ('repq-bn', 'plain')])
def test_a_pair_at_the_same_moment(tmp_path, pair):
    "One run is there at the end, and it is whole"
    ps = [shell('train', 'repvgg_a0_tiny', '--method', m, '--batch-size', 240, '--epochs', 1, '--timing', 0, '--out', tmp_path/'x') for m in pair]
    said = [p.communicate(timeout=120)[1] for p in ps]
    assert sorted(p.returncode for p in ps) == [0, 1], said
    winner = next(m for m, p in zip(pair, ps) if p.returncode == 0)
    recipe, model, _ = load_run(tmp_path/'x')
    row = json.loads((tmp_path/'x'/'results.json').read_text())[0]
    assert recipe.method == row['method'] == winner and eval_run(tmp_path/'x')['accuracy'] == row['accuracy'] and [f.name for f in tmp_path.iterdir()] == ['x']
    loser = said[[p.returncode for p in ps].index(1)].strip()
    assert '\n' not in loser and ('being made by another command' in loser or 'exists' in loser)

def test_a_lock_ends_with_its_process(tmp_path):
    "Also where a worker process that was forked lives on"
    code = f'''import os, time\nfrom repq.files import locked\nwith locked({str(tmp_path/"x")!r}):\n    if not os.fork(): time.sleep(30); os._exit(0)\n    print('here', flush=True); os.kill(os.getpid(), 9)'''
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert p.stdout.readline() == 'here\n'; p.wait()
        with locked(tmp_path/'x'): pass
    finally: os.killpg(p.pid, signal.SIGKILL)

# Disks

@contextmanager
def no_file_longer_than(n):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)); signal.signal(signal.SIGXFSZ, old)

@pytest.mark.parametrize('args', [['quantize', '{0}/fp', '--ptq', '--batches', '1', '--out', 'new'], ['export', '{0}/w4', '--format', 'safetensors', '--out', 'new.safetensors'], ['export', '{0}/w4', '--format', 'pt2', '--out', 'new.pt2'],
                                  ['export', '{0}/w4', '--packed', '--out', 'new.onnx'], ['convert', '{0}/fp/model.safetensors', 'new.pth', '--model', 'repvgg_a0_tiny'], ['convert', '{0}/fp/model.safetensors', 'new.safetensors', '--model', 'repvgg_a0_tiny'], ['report', '{0}/fp', '--out', 'new'],
                                  ['train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--batch-size', '240', '--epochs', '1', '--timing', '0', '--out', 'new']])
def test_a_full_disk(runs, tmp_path, monkeypatch, args):
    "The kernel's own refusal: one line with the file and what to do, exit code 1, nothing left but a training's folder"
    monkeypatch.chdir(tmp_path)
    with no_file_longer_than(6000): res = run(*(a.format(runs) for a in args))
    assert res.exit_code == 1 and isinstance(res.exception, OSError), res.exception
    text = str(res.exception)
    assert 'new' in text and 'File too large' in text and 'make room on that disk' in text and '\n' not in text
    assert [f.name for f in tmp_path.iterdir()] == (['new.part'] if args[0] == 'train' else [])

def test_room_is_asked_for_before(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    for f in train, plan:
        with pytest.raises(OSError, match='x cannot be written: it takes about .* and its disk has 0.0 MB left: make room'): f(get_recipe(**TINY), tmp_path/'a'/'x', timing=0)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('place,words', [('file/x', 'is a file, not a folder'), ('n'*300, 'give a shorter name'), ('.', 'exists: give another folder'), ('..', 'exists: give another folder'), ('/', 'exists: give another folder'), ('file', 'exists'), ('nowhere', 'exists')])
@pytest.mark.parametrize('command', ['train repvgg_a0_tiny --method repq-bn --batch-size 240 --epochs 1 --out', 'train repvgg_a0_tiny --method repq-bn --batch-size 240 --dry-run --out', 'quantize {0}/fp --ptq --out'])
def test_places_that_cannot_be(runs, tmp_path, monkeypatch, command, place, words):
    monkeypatch.chdir(tmp_path); Path('file').write_text('x'); Path('nowhere').symlink_to('nothing')
    before = seen(tmp_path)
    res = run(*command.format(runs).split(), place)
    assert res.exit_code == 1 and words in str(res.exception) and '\n' not in str(res.exception), res.exception
    assert seen(tmp_path) == before

# The end of a run

def test_killed_at_the_move(runs, tmp_path, monkeypatch):
    "Before it, in the middle of taking checkpoints away, and after: --resume ends with the same run and no checkpoints"
    class Killed(BaseException): pass
    def at(n):
        left = [n]
        def unlink(self, *a, **k):
            if self.name.startswith('step-'):
                left[0] -= 1
                if left[0] < 0: raise Killed
            return real(self, *a, **k)
        return unlink
    real = Path.unlink
    for n in range(3):
        out = tmp_path/f'x{n}'
        with monkeypatch.context() as m:
            m.setattr(Path, 'unlink', at(n))
            if n == 2: m.setattr(folders, 'put_in_place', lambda *a: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed): train(get_recipe(**TINY), out, minutes=0, keep=2 + n, **KW) if n < 2 else train(get_recipe(**TINY), out, **KW)
        if n == 2:
            with pytest.raises(FileExistsError, match='only has to be moved: --resume'): train(get_recipe(**TINY), out, **KW)
            assert 'only has to be moved' in plan(get_recipe(**TINY), out, resume=True)
        train(get_recipe(**TINY), out, resume=True, **KW)
        same_state(load_file(out/'model.safetensors'), load_file(runs/'fp'/'model.safetensors'))
        assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in (runs/'fp').iterdir()) and not (tmp_path/f'x{n}.part').exists()

def test_a_place_that_is_taken_at_the_end(tmp_path, monkeypatch):
    "What another made meanwhile stays, and the run that is finished says where it is; --resume moves it"
    real = folders.RunFolder.move
    def late(self): self.out.mkdir(); (self.out/'x').write_text('theirs'); real(self)
    with monkeypatch.context() as m:
        m.setattr(folders.RunFolder, 'move', late)
        with pytest.raises(FileExistsError, match='run exists: it was made meanwhile, .*the run is finished, in .*run.part: --resume'): train(get_recipe(**TINY), tmp_path/'run', **KW)
    assert (tmp_path/'run/x').read_text() == 'theirs'
    shutil.move(tmp_path/'run', tmp_path/'theirs')
    assert train(get_recipe(**TINY), tmp_path/'run', resume=True, **KW)['accuracy'] is not None and not (tmp_path/'run.part').exists()

def test_a_finished_run_without_weights(runs, tmp_path):
    shutil.copytree(runs/'fp', tmp_path/'fp'); (tmp_path/'fp'/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='its weights are missing'): train(get_recipe(**TINY), tmp_path/'fp', resume=True, **KW)

def test_the_end_is_rehearsed(tmp_path, monkeypatch):
    "What fails at the end fails before the first step, in a plan as well; the generators are where they were"
    for what, change in (('deploy', lambda m: m.setattr(runs_module.surgery, 'deploy', lambda *a, **k: (_ for _ in ()).throw(ValueError('no such deployment')))), ('cost', lambda m: m.setattr(runs_module, 'layer_costs', lambda *a: (_ for _ in ()).throw(ValueError('no such deployment'))))):
        for f in train, plan:
            with monkeypatch.context() as m:
                change(m)
                with pytest.raises(ValueError, match='no such deployment'): f(get_recipe(**TINY), tmp_path/'x', timing=0)
    for timing in -1, 10**9:
        for f in train, plan:
            with pytest.raises(ValueError, match='timing must be a whole number'): f(get_recipe(**TINY), tmp_path/'x', timing=timing)
    assert not list(tmp_path.iterdir())

def test_one_class_is_nothing_to_tell_apart(tmp_path):
    "A tree unpacked into a folder too deep: every network has all of it right at once"
    for s in 'train', 'val':
        (tmp_path/'data'/s/'all').mkdir(parents=True)
        for i in range(4): Image.new('RGB', (12, 12), (60*i, 9, 9)).save(tmp_path/'data'/s/'all'/f'{i}.png')
    for f in train, plan:
        with pytest.raises(ValueError, match='data has images of one class only, all, .* one too deep'): f(get_recipe(**{**TINY, 'data': str(tmp_path/'data'), 'batch_size': 4}), tmp_path/'x', timing=0)
    assert not (tmp_path/'x').exists()

def test_images_that_the_measure_cannot_take(tmp_path):
    for n, size in (('a', 64), ('b', 64), ('c', 64)): Image.effect_noise((size, size), 60).save(tmp_path/f'{n}.png')
    (tmp_path/'valid').mkdir(); Image.effect_noise((12, 40), 60).save(tmp_path/'valid'/'small.png')
    recipe = get_recipe('ecbsr_m4c8', 'repq', data=str(tmp_path), benchmarks=str(tmp_path/'valid'), crop=32, iterations=2, batch_size=2, epochs=1)
    for f in train, plan:
        with pytest.raises(ValueError, match='small.*smaller than what the measures need at this scale, of 15'): f(recipe, tmp_path/'x', timing=0)

# What is read

def state_of(path): return torch.load(path, weights_only=True)

@pytest.mark.parametrize('change', [lambda s: s.pop('rng'), lambda s: s.update(epoch=10**12), lambda s: s.update(epoch='1'), lambda s: s['model'].popitem(), lambda s: s['rng'].update(torch=torch.zeros(3)), lambda s: s['optimizer'].update(hypers=[{'lr': 'x'}]), lambda s: s['optimizer'].update(state=[], hypers=[]), lambda s: s['optimizer'].update(state=[{}]*999, hypers=[{}]),
                                    lambda s: next(iter(s['model'].values())).fill_(float('nan')), lambda s: s['callbacks'].pop('history'), lambda s: s['callbacks']['history'].update(rows=5), lambda s: s['callbacks']['history']['rows'].append('9'), lambda s: s['callbacks']['history'].update(rows=s['callbacks']['history']['rows']*2), lambda s: s['callbacks']['skip_non_finite'].update(skipped=3), lambda s: s.update(model={k: v.double() for k, v in s['model'].items()}), lambda s: s.update(pct_train=float('nan')), lambda s: s.update(batch=s['batch'] + 1),
                                    lambda s: s.update(step=s['step'] + 6, batch=s['batch'] + 6), lambda s: s.update(epoch=s['epoch'] + 1), lambda s: s.update(pct_train=.9)])
def test_a_wrong_but_readable_checkpoint(runs, tmp_path, change):
    "The one before it is tried, and the run ends with the same weights"
    with pytest.raises(RuntimeError, match='cut'): train(get_recipe(**TINY), tmp_path/'x', on_epoch=cut, timing=0, minutes=0, keep=3)
    last = max((tmp_path/'x.part'/'checkpoints').iterdir())
    state = state_of(last); change(state); torch.save(state, last)
    with pytest.warns(UserWarning, match=f'{last.name} cannot be read .*the checkpoint before it is taken'): train(get_recipe(**TINY), tmp_path/'x', resume=True, **KW)
    same_state(load_file(tmp_path/'x'/'model.safetensors'), load_file(runs/'fp'/'model.safetensors'))

@pytest.mark.parametrize('file,change,words', [
    ('recipe.json', lambda v: v.update(num_classes=10**12), 'num_classes'), ('recipe.json', lambda v: v.update(in_channels='1'), 'in_channels'), ('recipe.json', lambda v: v.update(classes=['a']), 'num_classes is 10, with 1 classes'), ('recipe.json', lambda v: v.pop('recipe'), 'recipe: Field required'),
    ('recipe.json', lambda v: v['recipe'].update(lr=float('nan')), 'lr must be'), ('recipe.json', lambda v: v['recipe'].update(seed=2**63), 'seed must be'), ('results.json', lambda v: v[0].update(accuracy=float('inf')), '0.accuracy'), ('results.json', lambda v: v[0].pop('seed'), '0.seed: Field required'), ('results.json', lambda v: v[0].update(weight_bits=4.5), '0.weight_bits')])
def test_json_of_runs(runs, tmp_path, file, change, words):
    shutil.copytree(runs/'fp', tmp_path/'fp')
    value = json.loads((tmp_path/'fp'/file).read_text()); change(value); (tmp_path/'fp'/file).write_text(json.dumps(value))
    res = run('report' if file == 'results.json' else 'eval', tmp_path/'fp')
    assert res.exit_code == 1 and words in str(res.exception) and file in str(res.exception) and '\n' not in str(res.exception), res.exception

@pytest.mark.parametrize('change,words', [(lambda t, n: t[n].to(torch.int64), 'int64'), (lambda t, n: torch.full_like(t[n], float('nan')), 'not finite'), (lambda t, n: t[n].to(torch.complex64), 'complex64')])
@pytest.mark.parametrize('command', ['eval', 'init', 'export', 'convert', 'quantize', 'teacher'])
def test_weights_that_are_none(runs, tmp_path, change, words, command):
    "The layer is named"
    source = runs/('w4' if command == 'export' else 'fp')
    shutil.copytree(source, tmp_path/'r')
    t = load_file(source/'model.safetensors')
    name = next(n for n in t if n.startswith('stages.0') and n.endswith('weight'))
    save_file({**t, name: change(t, name)}, tmp_path/'r'/'model.safetensors')
    args = dict(eval=['eval', tmp_path/'r'], init=['train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--weight-bits', 4, '--init', tmp_path/'r', '--dry-run', '--out', tmp_path/'x'], export=['export', tmp_path/'r', '--out', tmp_path/'x.onnx'],
                convert=['convert', tmp_path/'r'/'model.safetensors', tmp_path/'x.pth', '--model', 'repvgg_a0_tiny'], quantize=['quantize', tmp_path/'r', '--ptq', '--out', tmp_path/'x'], teacher=['train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--teacher', tmp_path/'r', '--dry-run', '--out', tmp_path/'x'])[command]
    res = run(*args)
    assert [f.name for f in tmp_path.iterdir()] == ['r']
    assert res.exit_code == 1 and words in str(res.exception) and name.rpartition('.')[0] in str(res.exception), res.exception

@pytest.mark.parametrize('change', [lambda t: t.index_fill(0, torch.tensor(3), float('nan')), lambda t: t.index_fill(0, torch.tensor(0), -float('inf')), lambda t: t.double()*1e300, lambda t: -t - 1])
def test_weights_of_others_that_are_none(tmp_path, change):
    "As their authors' code writes them: convert and --init name the tensor"
    t = to_official(create_model('repvgg_a0_tiny', 10, 1), 'repvgg')
    name = next(n for n in t if n.endswith('running_var'))
    torch.save({**t, name: change(t[name])}, tmp_path/'a.pth')
    for args in (['convert', tmp_path/'a.pth', tmp_path/'x.safetensors'], ['convert', tmp_path/'a.pth', tmp_path/'x.pth', '--deployed'], ['train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--weight-bits', 4, '--init', tmp_path/'a.pth', '--dry-run', '--out', tmp_path/'x']):
        res = run(*args)
        assert res.exit_code == 1 and name in str(res.exception), res.exception
    assert [f.name for f in tmp_path.iterdir()] == ['a.pth']

def described(change):
    "A change of the description in a file of integers"
    def f(t):
        d = json.loads(bytes(t['network'].tolist())); change(d)
        return {**t, 'network': torch.frombuffer(bytearray(json.dumps(d).encode()), dtype=torch.uint8)}
    return f
def a_layer(d): return next(s for s in d['steps'] if s['op'] == 'layer')

@pytest.mark.parametrize('change,words', [
    (described(lambda d: d.update(steps=[])), 'steps'), (described(lambda d: d['steps'][1].update(op='eval')), "no operation 'eval'"), (described(lambda d: d['steps'][1].update(inputs=['zzz'])), "reads 'zzz'"), (described(lambda d: d.update(output='zzz')), "'zzz'"), (described(lambda d: d['steps'].append(d['steps'][-1])), 'comes twice'),
    (described(lambda d: a_layer(d)['params'].update(bits=0)), 'bits of'), (described(lambda d: a_layer(d)['params'].update(room=-3)), 'room of'), (described(lambda d: a_layer(d)['grid'].update(step=0)), 'grid.step'), (described(lambda d: a_layer(d)['grid'].update(step=float('nan'))), 'grid.step'), (described(lambda d: d['steps'].pop(0)), 'nothing before it gives'),
    (lambda t: {k: torch.full_like(v, float('nan')) if v.is_floating_point() else v for k, v in t.items()}, 'not finite')])
def test_files_of_integers(runs, tmp_path, change, words):
    export_run(runs/'w4', tmp_path/'a.safetensors', 'safetensors')
    save_file(change(load_file(tmp_path/'a.safetensors')), tmp_path/'b.safetensors')
    load_integers(tmp_path/'a.safetensors')
    with pytest.raises(ValueError, match=words) as e: load_integers(tmp_path/'b.safetensors')
    assert 'b.safetensors' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('read', [load_integers, load_deployed, check_saturation, onnx_session])
def test_files_for_the_device_that_are_none(tmp_path, read):
    os.mkfifo(tmp_path/'pipe'); (tmp_path/'junk').write_bytes(b'junk'*100); (tmp_path/'empty').write_bytes(b''); (tmp_path/'folder').mkdir(); (tmp_path/'zero').symlink_to('/dev/zero')
    for name in 'pipe', 'junk', 'empty', 'folder', 'zero', 'gone':
        with pytest.raises((ValueError, OSError), match=name) as e: read(tmp_path/name)
        assert '\n' not in str(e.value)

def test_what_the_end_needs_is_read_before(runs, tmp_path):
    "An export whose run cannot take the note, and a report of which one picture cannot be drawn, leave nothing"
    shutil.copytree(runs/'w4', tmp_path/'w4'); shutil.copytree(runs/'fp', tmp_path/'fp')
    (tmp_path/'w4'/'results.json').write_text('{')
    for text in 'epoch,train_loss,valid_loss\n0,1,1\n', 'epoch,train_loss,valid_loss,accuracy\n0,1e300,1,.5\n':
        (tmp_path/'fp'/'history.csv').write_text(text)
        for args, name in ((['export', tmp_path/'w4', '--out', tmp_path/'x.onnx'], 'results.json'), (['report', tmp_path/'fp', '--out', tmp_path/'x'], 'history.csv')):
            res = run(*args)
            assert res.exit_code == 1 and name in str(res.exception) and sorted(f.name for f in tmp_path.iterdir()) == ['fp', 'w4'], res.exception

def test_names_that_come_twice_or_in_another_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in 'a,a\n1,2\n', 'a,\n1,2\n':
        Path('names.csv').write_text(text)
        with pytest.raises(ValueError, match='names.csv.*column'): files.read_csv('names.csv')
    split = lambda *classes: dict(classes=[*classes], images=0, shards=[])
    packed._check_index(dict(splits=dict(val=split('a', 'b'), train=split('a', 'b'))), 'index.json')
    with pytest.raises(ValueError, match='index.json.*splits.val.classes.*another order'): packed._check_index(dict(splits=dict(train=split('a', 'b'), val=split('b', 'a'))), 'index.json')

def test_a_report_into_its_run(runs, tmp_path):
    "Pictures of the run itself and files of others stay, whatever is asked for"
    shutil.copytree(runs/'fp', tmp_path/'fp'); shutil.copytree(runs/'w4', tmp_path/'w4'); (tmp_path/'w4'/'layers.md').write_text('mine')
    before = seen(tmp_path)
    for n in 'fp', 'w4':
        res = run('report', tmp_path/n, '--no-alone', '--out', tmp_path/n, '--overwrite')
        assert res.exit_code == 1 and 'belongs to the run' in str(res.exception), res.exception
        new = {k: v for k, v in seen(tmp_path).items() if k in before}
        assert new == before

def killed(f):
    "Run `f` in a process of its own, which is expected to kill itself"
    pid = os.fork()
    if not pid:
        try: f()
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

def test_a_report_that_was_killed(runs, tmp_path):
    "Between two moves or before: the next one takes the place of what it left, and of nothing else"
    report = lambda *extra: run('report', runs/'fp', '--out', tmp_path/'r', *extra)
    def die_at(f, n):
        calls = []
        def g(*args, **kw):
            calls.append(args)
            return f(*args, **kw) if len(calls) < n else os.kill(os.getpid(), signal.SIGKILL)
        return g
    def cut(where, name, n):
        def f(): setattr(where, name, die_at(getattr(where, name), n)); report()
        return f
    killed(cut(folders, '_move_report', 1)) # all pictures are made, none is moved
    assert not [f for f in (tmp_path/'r').iterdir() if f.name[0] != '.']
    killed(cut(folders, 'writing', 2)) # one is moved
    assert [f.name for f in (tmp_path/'r').iterdir() if f.name[0] != '.'] == ['accuracy.png']
    (tmp_path/'r'/'notes.txt').write_text('mine')
    killed(cut(folders, '_move_report', 1)) # and again, with all pictures made once more
    killed(cut(folders, '_mark_report', 1))
    assert report().exit_code == 0
    assert sorted(f.name for f in (tmp_path/'r').iterdir()) == ['accuracy.png', 'history.png', 'notes.txt', 'tradeoff.png']
    assert 'exists' in str(report().exception) and report('--overwrite').exit_code == 0

def test_shards_whose_move_was_killed(tmp_path, monkeypatch):
    "Between the last file and the move, where their index says whose they are: the same command makes them"
    monkeypatch.chdir(tmp_path)
    for s in 'train', 'val':
        for c in 'ab': (tmp_path/'d'/s/c).mkdir(parents=True); Image.new('RGB', (8, 8)).save(tmp_path/'d'/s/c/'0.png')
    def cut():
        network_files.put_in_place = lambda part, out: os.kill(os.getpid(), signal.SIGKILL)
        run('shard', 'd', 's')
    killed(cut)
    assert (tmp_path/'s.part'/'index.json').exists() and not (tmp_path/'s.part'/'.repq').exists()
    assert run('shard', 'd', 's').exit_code == 0 and sorted(f.name for f in tmp_path.iterdir()) == ['d', 's']
    shutil.rmtree('s')
    def cut_before():
        network_files._put_new = network_files.os.replace = lambda part, path: os.kill(os.getpid(), signal.SIGKILL)
        run('shard', 'd', 's')
    killed(cut_before) # in the first file, the marker
    assert [f.suffix for f in (tmp_path/'s.part').iterdir()] == ['.tmp']
    assert run('shard', 'd', 's').exit_code == 0 and sorted(f.name for f in tmp_path.iterdir()) == ['d', 's']

def test_a_report_is_whole_or_not_there(runs, tmp_path, monkeypatch):
    "Its two halves, the comparison and the layers, too"
    from repq import plots
    save = plots.save
    def full(fig, path, **kw):
        if path.name == 'steps.png': raise OSError(f'{path} cannot be written (No space left on device): make room on that disk')
        return save(fig, path, **kw)
    monkeypatch.setattr(plots, 'save', full)
    res = run('report', runs/'w4', '--no-alone', '--out', tmp_path/'r')
    assert res.exit_code == 1 and 'steps.png' in str(res.exception) and not list(tmp_path.iterdir())
    monkeypatch.setattr(plots, 'save', save)
    (tmp_path/'r'/'.report.part').mkdir(parents=True); (tmp_path/'r'/'.report.part'/'thesis.tex').write_text('years')
    res = run('report', runs/'w4', '--no-alone', '--out', tmp_path/'r')
    assert res.exit_code == 1 and 'was not made by repq' in str(res.exception) and [f.name for f in (tmp_path/'r').rglob('*')] == ['.report.part', 'thesis.tex']

def test_a_report_without_room_for_its_marker(runs, tmp_path, monkeypatch):
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(folders, 'mark', full)
    res = run('report', runs/'fp', '--out', tmp_path/'r')
    assert res.exit_code == 1 and not list(tmp_path.iterdir()), res.exception

def test_an_error_between_two_moves_of_a_report(runs, tmp_path, monkeypatch):
    "What was there stays, and of what is new all or nothing"
    (tmp_path/'r').mkdir(); (tmp_path/'r'/'notes.txt').write_text('mine')
    moves = folders.writing
    def full(path, *args):
        if path.name == 'history.png': raise OSError(f'{path} cannot be written (No space left on device): make room on that disk')
        return moves(path, *args)
    monkeypatch.setattr(folders, 'writing', full)
    res = run('report', runs/'fp', '--out', tmp_path/'r')
    assert res.exit_code == 1 and 'history.png' in str(res.exception) and [f.name for f in (tmp_path/'r').rglob('*')] == ['notes.txt']

def test_a_table_of_coverage_goes_on(tmp_path, monkeypatch):
    "With what is there, if it is such a table, and made alike"
    monkeypatch.chdir(tmp_path)
    command = 'bench', 'coverage', 'torchvision:alexnet', '--timeout', '.01', '--json', 'table.json'
    assert run(*command).exit_code == 0 and run(*command, 'torchvision:vgg11').exit_code == 0
    rows = json.loads(Path('table.json').read_text())['rows']
    assert [r['network'] for r in rows] == ['torchvision:alexnet', 'torchvision:vgg11'] and all('took longer' in r['failed'] for r in rows)
    whole = dict(network='torchvision:alexnet', bits=8, convolutions=1., islands=0, differing=0, island_error=None)
    for rows, words in ([dict(failed='x')], 'rows.0.network'), ([3], 'rows.0'), (3, 'rows'), ([dict(network='x')], 'rows.0 has no convolutions'), ([whole | dict(bits=4)], 'was made with --bits 4, and this is with --bits 8'):
        Path('table.json').write_text(text := json.dumps(dict(made='made by repq', rows=rows)))
        res = run(*command)
        assert res.exit_code == 1 and words in str(res.exception) and Path('table.json').read_text() == text, res.exception
    for settings, words in (dict(candidates=8), 'was made with --candidates 8, and this is without --candidates'), (dict(size=32), 'with --size 32, and this is with --size 64'), (dict(candidates='8'), 'candidates: '), (dict(size=0), 'size: '):
        Path('table.json').write_text(text := json.dumps(dict(made='made by repq', rows=[whole], **settings)))
        res = run(*command)
        assert res.exit_code == 1 and words in str(res.exception) and Path('table.json').read_text() == text, res.exception
    Path('table.json').write_text(text := json.dumps(dict(rows=[whole])))
    res = run(*command)
    assert res.exit_code == 1 and 'not made by repq' in str(res.exception) and Path('table.json').read_text() == text

@pytest.mark.parametrize('text', ['', 'made by r', 'made by repq: process 1 on x, since 2020-01-01'])
def test_a_lock_that_a_kill_left_is_taken_over(tmp_path, text):
    "Without a word, wherever the writing of its file was cut off"
    (lock := lock_file(tmp_path/'x')).write_text(text)
    files.check_unlocked(tmp_path/'x')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with locked(tmp_path/'x'): assert lock.read_text().startswith(f'made by repq: process {os.getpid()} ')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('args', [['train', 'repvgg_a0_tiny', '--dry-run', '--out', '~/x'], ['quantize', 'fp', '--ptq', '--out', '~'], ['report', 'fp', '--out', '~/x'], ['bench', 'peers', '--json', '~/x.json'], ['convert', 'fp/model.safetensors', '~/x.pth', '--model', 'repvgg_a0_tiny']])
def test_a_home_that_the_shell_left(runs, tmp_path, monkeypatch, args):
    shutil.copytree(runs/'fp', tmp_path/'fp'); monkeypatch.chdir(tmp_path)
    res = run(*args)
    assert res.exit_code == 1 and 'would be made in a folder named ~' in str(res.exception) and [p.name for p in tmp_path.iterdir()] == ['fp'], res.exception

def test_an_export_whose_name_is_no_text(runs, tmp_path):
    place = os.fsdecode(os.fsencode(tmp_path) + b'/m\xff.onnx')
    assert 'equals the integer reference' in export_run(runs/'w4', place) and os.listdir(os.fsencode(tmp_path)) == [b'm\xff.onnx']

def test_the_file_of_a_benchmark_is_held(tmp_path):
    with locked(tmp_path/'a.json'):
        res = run('bench', 'peers', '--batch-size', 1, '--width', 2, '--depth', 1, '--size', 4, '--rounds', 1, '--no-compiled', '--json', tmp_path/'a.json')
    assert res.exit_code == 1 and 'is being made by another command' in str(res.exception) and not list(tmp_path.iterdir())

@pytest.mark.parametrize('finished', [False, True])
def test_what_a_killed_writer_leaves_is_taken_away(tmp_path, finished):
    "By the next command of that output, and only what nobody holds"
    pid = os.fork()
    if not pid:
        with locked(tmp_path/'x.json'), writing(tmp_path/'x.json') as part: part.write_text('half'); os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    left = [f.name for f in tmp_path.iterdir()]
    assert len(left) == 2 and any(n.startswith('x.json.') for n in left)
    (tmp_path/'x.json.tmp').write_text('theirs'); (tmp_path/'x.json.old.tmp').write_text('theirs')
    if finished: (tmp_path/'x.json').write_text(SIGNATURE)
    with replacing(tmp_path/'other'): # of a command that is at it
        if finished:
            with pytest.raises(FileExistsError): files.check_file(tmp_path/'x.json')
        else:
            with writing(tmp_path/'x.json') as part: part.write_text(SIGNATURE); network_files._sweep(tmp_path/'x.json')
            files.check_file(tmp_path/'x.json', overwrite=True)
        assert len(list(tmp_path.glob('other.*.tmp'))) == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ['other', 'x.json', 'x.json.old.tmp', 'x.json.tmp']

@pytest.mark.parametrize('args', [['bench', 'data', '{0}', '--images', 4, '--rounds', 1, '--size', 8, '--batch-size', 2, '--workers', 2], ['demo', '--quick', '--jobs', 2, '--model', 'repvgg_a0_tiny', '--out', '{0}/demo']])
def test_few_open_files(tmp_path, args):
    "Processes that could not get theirs are not begun: torch's loader hangs with 20, and prints tracebacks with 24"
    for split in 'train', 'val':
        for c in 'ab':
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(4): Image.new('RGB', (12, 12), (i*20, 90, 200 if c == 'a' else 20)).save(tmp_path/split/c/f'{i}.png')
    p = shell(*(str(a).format(tmp_path) for a in args), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)))
    said = p.communicate(timeout=300)[1].strip().splitlines()
    assert p.returncode == 1 and len(said) == 1 and 'need 48 open files' in said[0] and 'ulimit -n' in said[0], said
    assert not (tmp_path/'demo').exists()

def test_no_more_threads():
    assert 'ulimit -u' in error_line(RuntimeError("can't start new thread"))

def test_a_checkpoint_that_may_not_be_read(tmp_path, monkeypatch):
    "It may be whole: nobody is told to delete it"
    (tmp_path/'step-0000000001.pt').write_bytes(b'x')
    def forbidden(*a, **k): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(torch, 'load', forbidden)
    with pytest.raises(OSError, match='step-0000000001.pt cannot be read .Permission denied.$'): read_state(tmp_path)

# Numbers and messages

@pytest.mark.parametrize('args,words', [
    ('train repvgg_a0_tiny --out x --checkpoint-minutes nan', '--checkpoint-minutes takes a finite number'), ('train repvgg_a0_tiny --out x --lr inf', '--lr takes a finite number'), ('train repvgg_a0_tiny --out x --seed 9223372036854775808', '--seed takes a whole number'),
    ('quantize {0}/fp --ptq --out x --input-bits 0', '0'), ('quantize {0}/fp --ptq --out x --weight-bits 32', 'needs 2 to 16 bits, got 32'), ('quantize {0}/fp --ptq --out x --layer-bits stem.conv=4,stem.conv=8', 'stem.conv comes twice'),
    ('train repvgg_a0_tiny --out x --set lr=1 --set lr=2', 'lr is set twice'), ('train repvgg_a0_tiny --out x --epochs 3 --set epochs=5', 'epochs is given by --epochs and by --set epochs=5'), ('train repvgg_a0_tiny --out x --per-tensor --set per_channel=true', 'by --per-tensor and by --set'), ('train repvgg_a0_tiny --out x --set model=repvgg_a0', 'by MODEL and by --set'),
    ('train repvgg_a0_tiny --out x --out y', '--out is given twice'), ('eval {0}/fp --batch-size 3 --batch-size 4', '--batch-size is given twice'), ('report {0}/fp --alone --no-alone', '--alone/--no-alone is given twice'), ('demo --task sr --data images --out x', '--data and --model are for classification'), ('train repvgg_a0_tiny --out x --dry-run --benchmarks nowhere', 'benchmarks is for super-resolution'), ('quantize {0}/fp --ptq --out x --data digits', 'leave out --model, --block, --no-adopt and --data'), ('bench train-step repvgg_a0_tiny --only zzz', "unknown method 'zzz'"), ('bench train-step repvgg_a0_tiny --batch-size 0', 'batch_size must be'), ('bench peers --device cuda:7', 'there is no device'),
    ('train repvgg_a0_tiny --out x --per-tensor', 'per_channel=False has no effect in full precision'), ('train repvgg_a0_tiny --out x --dry-run --first-last-bits 4', 'first_last_bits=4 has no effect in full precision'), ('train repvgg_a0_tiny --out x --set sqr_mom=.9', 'sqr_mom=0.9 has no effect without optimizer=adam'),
    ('train repvgg_a0_tiny --out x --set distill=.9', 'distill=0.9 has no effect without a teacher'), ('train repvgg_a0_tiny --out x --method plain --full-precision merged', 'for plain networks'), ('train repvgg_a0_tiny --out x --dry-run --recompute', 'recompute is for exact statistics'), ('train repvgg_a0_tiny --out x --method repq-bn --recompute', 'recompute is for exact statistics'),
    ('train repvgg_a0_tiny --out x --method repq-bnest --weight-bits 4 --init {0}/fp --recompute', 'recompute is for exact statistics'),
    ('train ecbsr_m4c8 --method repq --out x --dry-run --recompute', 'recompute is for exact statistics'), ('train orepa_resnet18_tiny --method repq --full-precision merged --out x --recompute', 'recompute is for exact statistics'),
    ('train repvgg_a0_tiny --out x --capture', 'leave out capture'), ('train repvgg_a0_tiny --out x --dry-run --capture', 'leave out capture'),
    ('train repvgg_a0_tiny --out x --weight-bits 4 --init {0}/fp --full-precision merged', "full_precision is 'merged': leave it out, the start decides"),
    ('bench coverage torchvision:alexnet --size 0', 'size must be'), *((f'bench coverage torchvision:alexnet --candidates {n}', 'candidates must be a whole number, from 1') for n in (0, -1, 10**11)), ('bench coverage torchvision:alexnet --bits 1', '2 to 16'), ('bench coverage torchvision:alexnet --timeout 0', 'timeout must be'), ('bench coverage torchvision:alexnet torchvision:alexnett', 'did you mean alexnet'),
    ('bench peers --device zzz', "there is no device 'zzz'"), ('bench scaling --rounds 0', 'rounds must be'), ('bench inference repvgg_a0_tiny --size 0', 'size must be'), ('bench peers --width 900000 --size 900000', 'in memory'), ('shard nowhere x --size nan', '--size takes a finite number'),
    ('train repvgg_a0_tiny --out x --batch-size 64 --image-size 20000', 'image_size must be'), ('eval {0}/fp --batch-size 0', 'batch_size must be'), ('recipes --images-per-second inf', 'finite')])
def test_numbers(runs, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    res = run(*args.format(runs).split())
    assert res.exit_code == 1 and words in str(res.exception) and '\n' not in str(res.exception), res.exception
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('text,words', [('method,weight_bits\nrepq-bn,32\n', 'has no figures'), ('method,weight_bits,accuracy\nrepq-bn,32,\n', 'has no figures'), ('method,weight_bits,psnr\nrepq-bn,32,33\n', 'figures are psnr, those of the runs accuracy')])
def test_figures_of_nothing(runs, tmp_path, text, words):
    (tmp_path/'paper.csv').write_text(text)
    res = run('report', runs/'fp', '--beside', tmp_path/'paper.csv')
    assert res.exit_code == 1 and words in str(res.exception)

def test_figures_of_others(runs, tmp_path):
    (tmp_path/'paper.csv').write_text('method,weight_bits,accuracy\nrepq-zz,32,90\n')
    with pytest.warns(UserWarning, match='none of its figures'): assert run('report', runs/'fp', '--beside', tmp_path/'paper.csv').exit_code == 0

def test_data_of_another_length(tmp_path):
    "A run does not go on with another number of batches than it began with"
    for s in 'train', 'val':
        for c in 'ab':
            (tmp_path/'d'/s/c).mkdir(parents=True)
            for i in range(4): Image.new('RGB', (8, 8), (i, 9, 200*(c == 'a'))).save(tmp_path/'d'/s/c/f'{i}.png')
    recipe = get_recipe('repvgg_a0_tiny', 'repq-bn', data=str(tmp_path/'d'), batch_size=4, epochs=2)
    with pytest.raises(RuntimeError, match='cut'): train(recipe, tmp_path/'x', on_epoch=cut, timing=0, minutes=0)
    for i in range(4): shutil.copy(tmp_path/'d'/'train'/'a'/'0.png', tmp_path/'d'/'train'/'b'/f'more{i}.png')
    before = seen(tmp_path)
    for f in plan, train:
        with pytest.raises(ValueError, match='begun on data of 2 batches an epoch, and .* has 3'): f(recipe, tmp_path/'x', resume=True, timing=0)
    assert seen(tmp_path) == before

def test_photographs_that_changed(tmp_path, monkeypatch):
    "A run is not measured on other images than those of its own without a word"
    monkeypatch.chdir(tmp_path)
    for name, n in dict(pictures=4, bench=1).items():
        (tmp_path/name).mkdir()
        for i in range(n): Image.effect_noise((40, 40), 50).save(tmp_path/name/f'{i}.png')
    train(get_recipe('ecbsr_m4c8', 'repq', data='pictures', benchmarks='bench', crop=32, iterations=1, batch_size=2, epochs=1), 'sr', on_epoch=lambda *a: None, timing=0)
    assert eval_run('sr')['images'] == 1
    shutil.copy(tmp_path/'pictures'/'0.png', tmp_path/'bench'/'more.png')
    for f in lambda: eval_run('sr'), lambda: post_training('sr', 'x', 8, batches=1):
        with pytest.raises(ValueError, match='sr was trained with 1 of bench to validate on; its data, pictures, has 2 of bench now'): f()
    assert not (tmp_path/'x').exists() and eval_run('sr', str(tmp_path/'bench'))['images'] == 2

def test_a_parent_that_is_not_there(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    res = run('quantize', runs/'fp', '--ptq', '--batches', 1, '--out', 'x/../new')
    assert res.exit_code == 1 and 'there is no folder x' in str(res.exception) and not list(tmp_path.iterdir())

def test_grey_and_colour(runs, tmp_path):
    for s in 'train', 'val':
        for c in range(10): (tmp_path/'d'/s/str(c)).mkdir(parents=True); Image.new('RGB', (8, 8), (c, 0, 0)).save(tmp_path/'d'/s/str(c)/'0.png')
    with pytest.raises(ValueError, match='has colour images, .*fp was trained on grey ones'): eval_run(runs/'fp', str(tmp_path/'d'))

def test_links_in_a_circle(tmp_path):
    for c in 'ab': (tmp_path/'train'/c).mkdir(parents=True); Image.new('RGB', (8, 8)).save(tmp_path/'train'/c/'0.png')
    (tmp_path/'elsewhere').mkdir(); Image.new('RGB', (8, 8)).save(tmp_path/'elsewhere'/'1.png')
    for n, to in dict(me='.', up='..', other='../b', above='../..', away='../../elsewhere').items(): (tmp_path/'train'/'a'/n).symlink_to(to, target_is_directory=True)
    (tmp_path/'elsewhere'/'back').symlink_to('../train/a/away', target_is_directory=True)
    (tmp_path/'train'/'c').symlink_to('a', target_is_directory=True); os.mkfifo(tmp_path/'train'/'b'/'pipe.png')
    with pytest.warns(UserWarning, match='passed over that are no files'): found, y, vocab = list_images(tmp_path/'train')
    assert [os.path.relpath(f, tmp_path) for f in found] == ['train/a/0.png', 'train/a/away/1.png', 'train/b/0.png'] and vocab == ['a', 'b']

@pytest.mark.skipif(os.name == 'nt', reason='no such modes')
def test_others_may_read_weights_as_they_may_the_rest(runs, tmp_path):
    "safetensors makes files that only their owner reads"
    modes = {p.name: p.stat().st_mode & 0o777 for p in (runs/'w4').iterdir() if p.is_file()}
    assert modes['model.safetensors'] == modes['recipe.json'], modes
    assert not run('export', runs/'w4', '--to', 'safetensors', '--out', tmp_path/'x.safetensors').exit_code
    assert (tmp_path/'x.safetensors').stat().st_mode & 0o777 == modes['recipe.json']
