"Runs that are interrupted end with the weights of runs that are not."
import copy, errno, os, resource, shutil, signal, subprocess, sys, time, warnings
from functools import partial
import numpy as np, pytest, torch
from PIL import Image
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import nn
from helpers import same_state
from repq import resume
from repq.data import get_dls
from repq.learner import RepQCallback
from repq.recipes import get_recipe
from repq.resume import Checkpoints, ResumableLearner, SkipNonFinite, read_state, write_state
from repq.runs import read_history, train

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def ignore(done, of, values): pass
KW = dict(on_epoch=ignore, timing=0)
TINY = dict(model='repvgg_a0_tiny', method='repq-bn', epochs=2, batch_size=240)

def weights(run): return load_file(run/'model.safetensors')
def history(run): return [{k: v for k, v in r.items() if k != 'time'} for r in read_history(run)]
def same_run(a, b): same_state(weights(a), weights(b)); assert history(a) == history(b)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A full-precision run, and a 4-bit one from it, never interrupted"
    d, n = tmp_path_factory.mktemp('whole'), torch.get_num_threads()
    torch.set_num_threads(1)
    train(get_recipe(**TINY), d/'fp', **KW)
    train(get_recipe(**{**TINY, 'weight_bits': 4}), d/'w4', init=d/'fp', **KW)
    torch.set_num_threads(n)
    return d

# Killed

def shell(*args, **kw): return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', 'from repq.cli import main; main()', *map(str, args)], stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **kw)

def until(process, there):
    while not there():
        assert process.poll() is None, process.stderr.read()
        time.sleep(.005)

def test_killed_run_ends_with_the_same_weights(runs, tmp_path):
    "The command line, killed by SIGKILL in the first epoch and again in the second"
    cmd = ('train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--weight-bits', 4, '--epochs', 2, '--batch-size', 240, '--init', runs/'fp', '--out', tmp_path/'w4', '--timing', 0, '--checkpoint-minutes', 0, '--resume')
    steps = lambda: max([int(f.stem[5:]) for f in (tmp_path/'w4.part'/'checkpoints').glob('step-*.pt')], default=0)
    for step in 3, 8: # of 6 an epoch
        p = shell(*cmd)
        until(p, lambda: steps() >= step)
        p.send_signal(signal.SIGKILL); p.wait()
        assert step <= steps() < 12, 'killed too late to tell anything'
    p = shell(*cmd)
    assert p.wait() == 0, p.stderr.read()
    same_run(tmp_path/'w4', runs/'w4')
    assert sorted(f.name for f in (tmp_path/'w4').iterdir()) == sorted(f.name for f in (runs/'w4').iterdir()) and not (tmp_path/'w4.part').exists()

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_batch_and_leave_a_checkpoint(runs, tmp_path, sig):
    def ask(done, of, values):
        if done >= 1: os.kill(os.getpid(), sig)
    old = signal.getsignal(sig)
    with pytest.raises(KeyboardInterrupt): train(get_recipe(**TINY), tmp_path/'fp', on_epoch=ask, timing=0)
    assert signal.getsignal(sig) is old
    state = read_state(tmp_path/'fp.part'/'checkpoints')
    assert (state['epoch'], state['batch']) == (1, 1), 'the batch after the signal is the last'
    train(get_recipe(**TINY), tmp_path/'fp', resume=True, **KW)
    same_run(tmp_path/'fp', runs/'fp')

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Images in files, so that workers read them"
    root, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for split in 'train', 'val':
        for c in 'ab':
            (root/split/c).mkdir(parents=True)
            for i in range(16): Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(root/split/c/f'{i}.jpg')
    return root

@pytest.mark.parametrize('sig,times', [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_signals_to_the_group(photos, tmp_path, sig, times):
    "To the workers as well, as a queue and a terminal send them: a checkpoint, one line, and the command that goes on"
    p = shell('train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--data', photos, '--image-size', 64, '--batch-size', 8, '--epochs', 500, '--timing', 0, '--out', tmp_path/'run', start_new_session=True)
    try:
        until(p, lambda: any((tmp_path/'run.part'/'checkpoints').glob('step-*.pt')))
        for _ in range(times): os.killpg(p.pid, sig); time.sleep(.1)
        said = p.communicate(timeout=60)[1]
    finally: p.kill()
    assert p.returncode == 130, said
    last = max((tmp_path/'run.part'/'checkpoints').iterdir())
    assert said == f'repq: interrupted; the last checkpoint is {last}; to go on: repq train repvgg_a0_tiny --method repq-bn --data {photos} --image-size 64 --batch-size 8 --epochs 500 --timing 0 --out {tmp_path}/run --resume\n'
    assert read_state(last.parent)['step'] == int(last.stem[5:])

def test_too_many_unreadable_images(photos, tmp_path):
    "A worker finds it; what is said is one line all the same, and the end does not wait for the workers"
    shutil.copytree(photos, tmp_path/'photos')
    for i in range(4): (tmp_path/'photos'/'train'/'a'/f'{i}.jpg').write_bytes(b'junk')
    p = shell('train', 'repvgg_a0_tiny', '--method', 'repq-bn', '--data', tmp_path/'photos', '--image-size', 65, '--batch-size', 8, '--epochs', 5, '--timing', 0, '--out', tmp_path/'run')
    try: said = p.communicate(timeout=55)[1].splitlines()
    finally: p.kill()
    assert p.returncode == 1 and said[-1].startswith('repq: ') and 'of 32 images cannot be read' in said[-1] and not any('Traceback' in l for l in said), said

# Interrupted anywhere: a model with dropout, so that the generators matter

class Accident(Callback):
    order = 95
    def __init__(self, event, epoch, batch): self.where, self.event = (epoch, batch), event
    def _maybe(self, event):
        if event == self.event and (self.epoch, self.iter if 'batch' in event else 0) == self.where: raise RuntimeError('accident')
    def before_batch(self): self._maybe('before_batch' if self.training else 'before_valid_batch')
    def after_backward(self): self._maybe('after_backward')
    def after_step(self): self._maybe('after_step')
    def after_batch(self): self._maybe('after_batch' if self.training else 'after_valid_batch')
    def after_train(self): self._maybe('after_train')
    def after_epoch(self): self._maybe('after_epoch')

def fit(folder, opt, *cbs, minutes=0., state=None, spoil=()):
    set_seed(3, reproducible=True)
    dls = get_dls('digits', bs=240, seed=1, device='cpu')
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(128, 10))
    learn = ResumableLearner(dls, net, opt_func=opt, cbs=[RepQCallback(), SkipNonFinite(3), Checkpoints(folder, minutes, state=state), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=ParamScheduler({'lr': SchedCos(.05, 0.)}))
    return learn

@pytest.mark.parametrize('opt', [partial(SGD, mom=.9), Adam])
def test_interrupted_anywhere(tmp_path, opt):
    whole = fit(tmp_path/'whole', opt)
    for i, (event, epoch, batch, minutes) in enumerate([('before_batch', 0, 3, 0), ('before_batch', 1, 0, 0), ('after_backward', 1, 0, 0), ('after_step', 2, 0, 0), ('after_batch', 1, 5, 0), ('after_train', 1, 0, 0),
            ('before_valid_batch', 1, 0, 0), ('after_valid_batch', 2, 1, 0), ('after_epoch', 1, 0, 0), ('after_epoch', 2, 0, 0), ('before_batch', 2, 4, 15)]):
        folder = tmp_path/str(i)
        with pytest.raises(RuntimeError, match='accident'): fit(folder, opt, Accident(event, epoch, batch), minutes=minutes)
        rest = fit(folder, opt, state=read_state(folder), minutes=minutes)
        same_state(whole.model.state_dict(), rest.model.state_dict())
        assert not rest.recorder.values or rest.recorder.values == whole.recorder.values[-len(rest.recorder.values):], event
        for a, b in zip(whole.opt.state_dict()['state'], rest.opt.state_dict()['state']):
            assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
        assert len(list(folder.iterdir())) == 2

def test_interrupted_super_resolution(tmp_path):
    r = get_recipe('ecbsr_m4c8', 'repq', epochs=1, iterations=4, batch_size=2, crop=32)
    def cut(done, of, values): raise RuntimeError('cut')
    train(r, tmp_path/'whole', **KW)
    with pytest.raises(RuntimeError): train(r, tmp_path/'cut', timing=0, minutes=0, on_epoch=cut)
    train(r, tmp_path/'cut', resume=True, **KW)
    same_run(tmp_path/'cut', tmp_path/'whole')

# What is left when writing fails

def begun(tmp_path, at=1.5, **kw):
    "A run that was interrupted after the epoch `at`"
    def cut(done, of, values):
        if done >= at: raise RuntimeError('cut')
    with pytest.raises(RuntimeError, match='cut'): train(get_recipe(**{**TINY, **kw}), tmp_path/'run', on_epoch=cut, timing=0, minutes=0)
    return tmp_path/'run.part'/'checkpoints'

def refuse(monkeypatch, name):
    "The disk is full when a file of this name is to be forced onto it"
    real = os.fsync
    def full(fd):
        if name in os.readlink(f'/proc/self/fd/{fd}'): raise OSError(errno.ENOSPC, 'No space left on device')
        return real(fd)
    monkeypatch.setattr(os, 'fsync', full)

def full_picture(*args, **kw): raise OSError(errno.ENOSPC, 'No space left on device')

linux = pytest.mark.skipif(sys.platform != 'linux', reason='asks /proc')

@linux
def test_full_disk(runs, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        refuse(m, 'step-0000000004.pt')
        with pytest.raises(OSError, match='step-0000000004.pt cannot be written .No space left on device.: make room.*last checkpoint is .*step-0000000003.pt.*--resume') as e: train(get_recipe(**TINY), tmp_path/'fp', minutes=0, **KW)
    assert '\n' not in str(e.value)
    left = sorted(f.name for f in (tmp_path/'fp.part'/'checkpoints').iterdir())
    assert left == ['step-0000000002.pt', 'step-0000000003.pt']
    train(get_recipe(**TINY), tmp_path/'fp', resume=True, minutes=0, **KW)
    same_run(tmp_path/'fp', runs/'fp')

@linux
def test_full_disk_before_a_checkpoint(tmp_path, monkeypatch):
    refuse(monkeypatch, 'step-')
    with pytest.raises(OSError, match='make room.*; there is no checkpoint yet$'): train(get_recipe(**TINY), tmp_path/'fp', minutes=0, **KW)

@linux
def test_full_disk_at_the_end(runs, tmp_path, monkeypatch):
    "Whatever cannot be written is named, nothing half done is left, and going on writes it"
    r, part = get_recipe(**TINY), tmp_path/'fp.part'
    for i, name in enumerate(['history.csv', 'model.safetensors', 'results.json', 'history.png']):
        with monkeypatch.context() as m:
            if name == 'history.png': m.setattr(Figure, 'savefig', full_picture)
            else: refuse(m, f'{name}.')
            with pytest.raises(OSError, match=f'{name} cannot be written .No space left on device.: make room on that disk; the last checkpoint is .*--resume') as e: train(r, tmp_path/'fp', resume=bool(i), minutes=0, **KW)
        assert '\n' not in str(e.value) and not [f for f in part.rglob('*') if '.tmp' in f.name or f.name[0] == '.']
    train(r, tmp_path/'fp', resume=True, **KW)
    same_run(tmp_path/'fp', runs/'fp')

def test_file_that_may_not_grow(tmp_path):
    "The kernel's own refusal, through torch's writer"
    write_state(tmp_path/'step-1.pt', dict(x=torch.ones(10)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match='step-2.pt cannot be written .File too large.: make room'): write_state(tmp_path/'step-2.pt', dict(x=torch.ones(10**6)))
        with pytest.raises(OSError, match='x cannot be written .*File too large.*: make room'), resume.writing(tmp_path/'x') as part: save_file(dict(x=torch.ones(10**6)), part)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [f.name for f in tmp_path.iterdir()] == ['step-1.pt'] and read_state(tmp_path)['x'].sum() == 10

def test_no_matter_of_the_disk(tmp_path):
    "An error that only happens while a file is written stays what it is"
    with pytest.raises(RuntimeError, match='^DataLoader worker'), resume.writing(tmp_path/'x'): raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Terminated.')
    with pytest.raises(OSError, match='there is no folder .*no: make it first$'), resume.writing(tmp_path/'no'/'x') as part: part.write_text('')

def test_damaged_checkpoint(runs, tmp_path):
    folder = begun(tmp_path, 2) # after the last epoch
    a, b = sorted(folder.iterdir())
    b.write_bytes(b.read_bytes()[:-100])
    with pytest.warns(UserWarning, match='cannot be read'): train(get_recipe(**TINY), tmp_path/'run', resume=True, **KW)
    same_run(tmp_path/'run', runs/'fp')
    a.parent.mkdir(parents=True); a.write_bytes(b'junk')
    with warnings.catch_warnings(), pytest.raises(ValueError, match='none of the 1 checkpoints'): warnings.simplefilter('ignore'); read_state(a.parent)

def test_checkpoints_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save(Evil(), tmp_path/'step-1.pt')
    with warnings.catch_warnings(), pytest.raises(ValueError): warnings.simplefilter('ignore'); read_state(tmp_path)
    assert not (tmp_path/'ran').exists()

def test_place_taken(runs, tmp_path):
    begun(tmp_path)
    for kw, words in (dict(), ('beginning of a run', '--resume')), (dict(resume=True, lr=.3), ('lr 0.05 instead of 0.3',)), (dict(keep=0), ('keep',)):
        with pytest.raises((ValueError, OSError)) as e: train(get_recipe(**{**TINY, **{k: v for k, v in kw.items() if k == 'lr'}}), tmp_path/'run', **KW, **{k: v for k, v in kw.items() if k != 'lr'})
        for w in words: assert w in str(e.value)
    with pytest.raises(FileExistsError): train(get_recipe(**TINY), runs/'fp', **KW)
    assert train(get_recipe(**TINY), runs/'fp', resume=True, **KW)['epochs'] == 2

# Steps that are not finite

class Spoil(Callback):
    "An infinite gradient, or a loss that is not a number, in some steps"
    order = 3
    def __init__(self, what, *steps): self.what, self.steps = what, steps
    def before_batch(self):
        if self.training and self.what == 'loss' and self.train_iter in self.steps: self.learn.xb = (self.xb[0]*float('nan'),)
    def after_backward(self):
        if self.what == 'gradient' and self.train_iter in self.steps: next(self.model.parameters()).grad[0] = float('inf')

@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_steps_that_are_not_finite(tmp_path, what):
    with pytest.warns(UserWarning) as w: learn = fit(tmp_path/'a', partial(SGD, mom=.9), Spoil(what, 2, 9))
    said = [str(o.message) for o in w if 'step skipped' in str(o.message)]
    assert len(said) == 2 and f'the {what} is' in said[0] and 'epoch 0, batch 2' in said[0] and 'epoch 1, batch 3' in said[1]
    assert all(t.isfinite().all() for t in learn.model.state_dict().values()) and torch.tensor(learn.recorder.values).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(FloatingPointError, match='epoch 1, batch 2, after 3 skipped steps'): fit(tmp_path/'b', partial(SGD, mom=.9), Spoil(what, 2, 4, *range(7, 99))) # of 6 an epoch
        assert sorted(f.name for f in (tmp_path/'b').iterdir()) == ['step-0000000006.pt', 'step-0000000007.pt'], 'no checkpoint while steps are skipped'
        good = copy.deepcopy(read_state(tmp_path/'b'))
        assert all(t.isfinite().all() for t in good['model'].values()) and good['callbacks']['skip_non_finite']['skipped'] == [f'epoch 0, batch {i}' for i in (2, 4)]
        with pytest.raises(FloatingPointError, match='epoch 1, batch 2'): fit(tmp_path/'b', partial(SGD, mom=.9), Spoil(what, *range(7, 99)), state=good) # the budget is not renewed

def test_divergence_names_the_checkpoint(tmp_path):
    with warnings.catch_warnings(), pytest.raises(FloatingPointError) as e:
        warnings.simplefilter('ignore'); train(get_recipe(**{**TINY, 'lr': 1e30}), tmp_path/'run', minutes=0, skips=1, **KW)
    assert 'after 1 skipped steps' in str(e.value) and 'last checkpoint, from before these steps, is ' + str(tmp_path/'run.part'/'checkpoints'/'step-0000000001.pt') in str(e.value) and '\n' not in str(e.value)
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match='after 1 skipped steps.*; there is no checkpoint yet$'):
        warnings.simplefilter('ignore'); train(get_recipe(**{**TINY, 'lr': 1e30}), tmp_path/'other', skips=1, **KW)
