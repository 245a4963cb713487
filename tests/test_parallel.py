"The same global batch in one process and in two: the same training, to rounding."
import json, os, shutil, signal, subprocess, sys, time
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from helpers import same_state
from repq.recipes import get_recipe
from repq.resume import read_state
from repq.runs import read_history, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == 'win32', reason='needs torch.distributed with gloo')
DIGITS, SR = dict(epochs=1, batch_size=240), dict(epochs=1, iterations=6, batch_size=4, crop=32)
JOBS = { # name -> get_recipe's arguments, the run it starts from, parts
    'sr': (dict(model='ecbsr_m4c8', method='repq', lr=2e-3, **SR), None, 1),
    'sr-w4': (dict(model='ecbsr_m4c8', method='repq', weight_bits=4, **SR), 'sr', 1),
    'sr-w4-parts': (dict(model='ecbsr_m4c8', method='repq', weight_bits=4, **SR), 'sr', 2),
    'unreadable': (dict(model='repvgg_a0_tiny', method='repq-bn', data='tree', image_size=72, epochs=2, batch_size=8), None, 1),
    'plain': (dict(model='resnet18_tiny', method='plain', **DIGITS), None, 1),
    'branched': (dict(model='repvgg_a0_tiny', method='repq-bn', **DIGITS), None, 1),
    'repq-bnest': (dict(model='repvgg_a0_tiny', method='repq-bnest', weight_bits=4, **DIGITS), 'branched', 1),
    'repq-bn': (dict(model='repvgg_a0_tiny', method='repq-bn', weight_bits=8, **DIGITS), 'branched', 1)}
PROGRAM = '''
import copy, json, sys, torch
from repq.training import tasks
from repq.data import ImageDL
from repq.superres import PairDL
from repq.parallel import process_group
from repq.recipes import get_recipe
from repq.runs import train
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
for cls in ImageDL, PairDL:
    cls.after_batch = lambda self, b, f=cls.after_batch: tuple(t.double() if t.is_floating_point() else t for t in f(self, b))
psnrs, tasks.psnrs = tasks.psnrs, lambda model, deployed, *args: psnrs(copy.deepcopy(model).float(), deployed.float(), *args)
jobs, whole, out = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
with process_group():
    for name, (kw, init, parts) in jobs.items(): train(get_recipe(**kw), f'{out}/{name}', init=init and f'{whole}/{init}', on_epoch=lambda *a: None, timing=0, accumulate=parts)
'''

def torchrun(*args, how=('--standalone', '--nproc-per-node', '2'), before=(), **kw):
    return subprocess.Popen([*before, sys.executable, '-m', 'torch.distributed.run', *how, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}, **kw) # a new store for new processes

def unreadable_images(root):
    "Two classes of sixteen images, two of the training ones and one of validation damaged, and read from files"
    for s, split in enumerate(('train', 'val')):
        for i in range(32):
            f = root/split/'ab'[i//16]/f'{i:02d}.png'; f.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(100*s + i).integers(0, 128 + 4*i, (80, 90, 3), dtype=np.uint8)).save(f)
    for n in 'train/a/03.png', 'train/b/31.png', 'val/b/20.png': (root/n).write_bytes(b'')
    return root

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two folders of the same runs: by one process, by two; in float64, where hardly anything falls to the other side of a rounding"
    one, two = tmp_path_factory.mktemp('one'), tmp_path_factory.mktemp('two')
    (two/'program.py').write_text(PROGRAM)
    JOBS['unreadable'][0]['data'] = str(unreadable_images(one/'tree'))
    said = subprocess.run([sys.executable, two/'program.py', json.dumps({n: (kw, init, 1) for n, (kw, init, _) in JOBS.items()}), one, one], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    p = torchrun(two/'program.py', json.dumps(JOBS), one, two)
    try: said = p.communicate(timeout=300)[0]
    finally: p.kill()
    assert p.returncode == 0, said
    return one, two

def same_training(one, two, name):
    "The run `name` in two folders of float64 runs, of which the second is by two processes"
    a, b = (load_file(d/name/'model.safetensors') for d in (one, two))
    assert a.keys() == b.keys()
    for n, v in a.items():
        if v.is_floating_point(): assert v.dtype == torch.float64 and (v - b[n]).norm() <= 1e-5*v.norm() + 1e-9, f'{n}: {(v - b[n]).norm():.2g} of {v.norm():.2g}'
        else: assert torch.equal(v, b[n]), n
    for x, y in zip(read_history(one/name), read_history(two/name), strict=True):
        for k in ('train_loss', 'valid_loss'): assert float(x[k]) == pytest.approx(float(y[k]), rel=1e-5), k
    row, other = (json.loads((d/name/'results.json').read_text())[0] for d in (one, two))
    assert row['unreadable_images'] == other['unreadable_images'] == (3 if name == 'unreadable' else 0)
    assert row['skipped_steps'] == other['skipped_steps'] == 0 and json.loads((two/name/'recipe.json').read_text())['processes'] == 2

@pytest.mark.parametrize('name', JOBS)
def test_two_processes_train_as_one(runs, name): same_training(*runs, name)

@pytest.fixture
def hosts(tmp_path):
    "Two hosts: network namespaces with a cable between them, in which both have names. Their names, and what to put before a command to have it run there"
    if os.geteuid() or not all(map(shutil.which, ('ip', 'unshare', 'mount'))): pytest.skip('network namespaces need root and the commands ip (iproute2), unshare and mount')
    names = [f'repq-{os.getpid()}-{i}' for i in (1, 2)]
    table = tmp_path/'hosts'
    table.write_text('127.0.0.1 localhost\n' + ''.join(f'10.77.0.{i} {n}\n' for i, n in enumerate(names, 1)))
    there = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    def ip(*args): subprocess.run(['ip', *args], check=True, capture_output=True, text=True)
    try:
        try:
            for n in names: ip('netns', 'add', n)
            ip('link', 'add', 'eth0', 'netns', names[0], 'type', 'veth', 'peer', 'name', 'eth0', 'netns', names[1])
            for i, n in enumerate(names, 1):
                ip('-n', n, 'addr', 'add', f'10.77.0.{i}/24', 'dev', 'eth0')
                for dev in 'lo', 'eth0': ip('-n', n, 'link', 'set', dev, 'up')
        except subprocess.CalledProcessError as e: pytest.skip(f'no network namespaces here: {e.stderr.strip()}')
        yield names, [['ip', 'netns', 'exec', n, 'unshare', '--uts', 'sh', '-c', there, n, str(table)] for n in names]
    finally:
        for n in names: subprocess.run(['ip', 'netns', 'del', n], capture_output=True)

def test_two_hosts_train_as_one(runs, hosts, tmp_path):
    "A process on each of two hosts that share no run folders: two stages, the second from the run that only the first host has"
    one, (names, before) = runs[0], hosts
    (tmp_path/'program.py').write_text(PROGRAM)
    jobs = json.dumps({n: JOBS[n] for n in ('branched', 'repq-bnest')})
    how = ('--nnodes', '2', '--nproc-per-node', '1', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'{names[0]}:29500')
    started = [torchrun(tmp_path/'program.py', jobs, init, tmp_path/str(i), how=how, before=b) for i, b, init in zip((1, 2), before, (one, tmp_path/'nowhere'))]
    try: said = [p.communicate(timeout=200)[0] for p in started]
    finally: [p.kill() for p in started]
    assert not any(p.returncode for p in started), '\n'.join(said)
    for n in json.loads(jobs): same_training(one, tmp_path/'1', n)
    assert not (tmp_path/'2').exists()

OPINIONS = '''
import sys, torch
from dataclasses import replace
from pathlib import Path
from fastai.torch_core import rank_distrib
from repq.parallel import process_group
from repq.recipes import get_recipe
from repq.runs import train
torch.set_num_threads(1)
class PowerCut(Exception): pass
def cut(done, of, values): raise PowerCut('power cut')
def go(r, name, on_epoch=lambda *a: None, **kw): return train(r, out/name, on_epoch=on_epoch, timing=0, minutes=0, **kw)
r = get_recipe('repvgg_a0_tiny', 'repq-bn', epochs=2, batch_size=240)
with process_group():
    rank = rank_distrib()
    out = Path(sys.argv[1], str(rank)) # no shared disk
    go(r, 'peace')
    try: go(r, 'run', cut)
    except PowerCut: pass
    go(r, 'run', resume=True)
    assert (go(r, 'run', resume=True) is None) == bool(rank) # finished
    for other, name in (r, 'run'), (replace(r, epochs=2 + rank), 'x'), (replace(r, data='nowhere') if rank else r, 'x'):
        try: go(other, name)
        except (ValueError, OSError) as e: print(f'{rank}: {e}\\n', end='')
'''

def test_processes_without_a_shared_disk(tmp_path):
    "The first process alone looks at the run folder, for all; where something else differs, all end with the reason"
    (tmp_path/'program.py').write_text(OPINIONS)
    p = torchrun(tmp_path/'program.py', tmp_path)
    try: said = p.communicate(timeout=200)[0]
    finally: p.kill()
    assert p.returncode == 0, said
    same_state(*(load_file(tmp_path/'0'/n/'model.safetensors') for n in ('peace', 'run')))
    assert not (tmp_path/'1').exists() and not (tmp_path/'0'/'x').exists()
    for rank in 0, 1:
        for text in 'run exists', 'process 1 would train something else than the first: epochs 3 instead of 2', 'nowhere': assert any(text in line for line in said.splitlines() if line.startswith(f'{rank}: ')), (rank, text, said)

def test_worker_killed(tmp_path):
    "One of two processes is killed: torchrun starts both again, and the run ends with the weights of a run in peace"
    cmd = ('--max-restarts', 1, '-m', 'repq.cli', 'train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--epochs', 2, '--batch-size', 240, '--timing', 0, '--checkpoint-minutes', 0, '--resume', '--out')
    peace, p = torchrun(*cmd, tmp_path/'peace'), None
    try:
        assert peace.wait(200) == 0, peace.stdout.read()
        p = torchrun(*cmd, tmp_path/'run')
        there, end = tmp_path/'run.part'/'checkpoints', time.monotonic() + 100
        while not any(there.glob('step-0*4.pt')) and time.monotonic() < end: time.sleep(.005)
        children = [int(c) for c in open(f'/proc/{p.pid}/task/{p.pid}/children').read().split()]
        os.kill(children[-1], signal.SIGKILL)
        said = p.communicate(timeout=200)[0]
    finally: [o.kill() for o in (peace, p) if o]
    assert p.returncode == 0 and 'going on at epoch' in said, said
    same_state(*(load_file(tmp_path/n/'model.safetensors') for n in ('peace', 'run')))
    assert len(read_history(tmp_path/'run')) == 2

def test_batches_that_cannot_be_shared(tmp_path):
    with pytest.raises(ValueError, match='batch_size=240 cannot be shared by 1 processes in 7 parts'): train(get_recipe('repvgg_a0_tiny', batch_size=240), tmp_path/'x', accumulate=7)
    assert not list(tmp_path.iterdir())

def test_signal_to_all(tmp_path):
    "As a queue sends it, to torchrun and its processes: the first one writes a checkpoint and says so, the others end when they miss it"
    there = tmp_path/'run.part'/'checkpoints'
    p = torchrun('-m', 'repq.cli', 'train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--epochs', 500, '--batch-size', 240, '--timing', 0, '--out', tmp_path/'run', start_new_session=True)
    try:
        end = time.monotonic() + 100
        while not any(there.glob('step-*.pt')) and time.monotonic() < end: time.sleep(.02)
        os.killpg(p.pid, signal.SIGTERM)
        said = p.communicate(timeout=60)[0]
    finally: p.kill()
    last = max(there.iterdir())
    assert [l for l in said.splitlines() if l.startswith('repq: ')] == [f'repq: interrupted; the last checkpoint is {last}; to go on: the same command with --resume'], said
    assert read_state(there)['step'] == int(last.stem[5:]) and 'RuntimeError' not in said
