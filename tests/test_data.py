"repq.data on trees of small synthetic images: both pipelines, the cache, reproducibility, and what bad input says"
import os, shutil, warnings
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import repq.training.data as D
from repq.data import *

CPU = dict(device='cpu', num_workers=0)

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('REPQ_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

def save(path, size=(12, 12), value=None, seed=0):
    "An image of noise, or of one value"
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if value is not None: a[:] = value
    Image.fromarray(a).save(path)

def tree(root, n=20, size=(12, 12), splits=('train', 'val'), classes=('a', 'b'), ext='png'):
    for s,split in enumerate(splits):
        for c,cls in enumerate(classes):
            for i in range(n): save(root/split/cls/f'{i:03d}.{ext}', size, seed=1000*s + 100*c + i)
    return root

@pytest.fixture
def root(tmp_path): return tree(tmp_path/'tree')

def fails(error, match, *args, **kwargs):
    with pytest.raises(error, match=match) as e: get_dls(*args, **{**dict(bs=4), **CPU, **kwargs})
    assert '\n' not in str(e.value)

def pixels(dl): return torch.cat([x for x,_ in dl])

# --- batches

@pytest.mark.parametrize('cache', [True, False])
def test_batches(root, cache):
    dls = get_dls(root, bs=8, valid_bs=16, size=12, cache=cache, seed=0, **CPU)
    assert (dls.c, list(dls.vocab), dls.size, dls.in_channels) == (2, ['a', 'b'], 12, 3)
    assert [len(y) for _,y in dls.train] == [8]*5 and [len(y) for _,y in dls.valid] == [16, 16, 8]
    for x,y in (dls.train.one_batch(), dls.valid.one_batch()):
        assert type(x) is torch.Tensor and type(y) is torch.Tensor
        assert (x.dtype, y.dtype, x.shape[1:]) == (torch.float32, torch.int64, (3, 12, 12))
    assert torch.cat([y for _,y in dls.train]).sort()[0].tolist() == [0]*20 + [1]*20
    assert torch.cat([y for _,y in dls.valid]).tolist() == [0]*20 + [1]*20
    assert describe(dls) == 'tree: 40 training and 40 validation images, 2 classes, 3×12×12, ' + ('in memory' if cache else 'from files')

def test_valid_pixels_are_the_files(root):
    dls = get_dls(root, bs=8, normalize=False, **CPU)
    want = np.stack([np.array(Image.open(root/'val'/c/f'{i:03d}.png')) for c in 'ab' for i in range(20)])
    assert torch.equal((pixels(dls.valid)*255).round().byte(), torch.from_numpy(want).permute(0, 3, 1, 2))

def test_normalization(root):
    dls = get_dls(root, bs=8, augment=False, **CPU)
    x = pixels(dls.train)
    assert x.mean((0,2,3)).abs().max() < 1e-4 and (x.std((0,2,3), correction=0)-1).abs().max() < 1e-4
    given = get_dls(root, bs=8, normalize=([.5]*3, [.25]*3), **CPU)
    raw = get_dls(root, bs=8, normalize=False, **CPU)
    assert torch.allclose(pixels(given.valid), (pixels(raw.valid)-.5)/.25, atol=1e-5)
    assert get_dls(root, bs=8, cache=False, size=12, **CPU).stats[0] == [0.485, 0.456, 0.406]

def test_constant_images(tmp_path):
    for s in ('train', 'val'):
        for i in range(4): save(tmp_path/'t'/s/'a'/f'{i}.png', value=7)
    assert torch.isfinite(pixels(get_dls(tmp_path/'t', bs=4, **CPU).train)).all()

def test_augmentation_only_moves_pixels(tmp_path):
    for s in ('train', 'val'):
        for i in range(40): save(tmp_path/'t'/s/'a'/f'{i:02d}.png', (16, 16), value=200)
    dls = get_dls(tmp_path/'t', bs=40, seed=0, normalize=False, **CPU)
    x = (dls.one_batch()[0]*255).round()
    assert set(x.unique().tolist()) == {0., 200.}                  # black comes in
    lines = (x[:,0]==200).any(2).sum(1), (x[:,0]==200).any(1).sum(1)
    for n in lines: assert n.min() >= 14 and n.max() == 16         # by at most an eighth of the side
    assert ((dls.valid.one_batch()[0]*255).round()==200).all()

def test_non_square(tmp_path):
    dls = get_dls(tree(tmp_path/'t', 4, (10, 14)), bs=4, **CPU)
    assert dls.size == (14, 10) and dls.one_batch()[0].shape == (4, 3, 14, 10) and '3×14×10' in describe(dls)
    assert get_dls(tmp_path/'t', bs=4, size=8, **CPU).one_batch()[0].shape == (4, 3, 8, 8)

def test_pipeline_follows_the_size(tmp_path):
    small,large = tree(tmp_path/'small', 4, (64, 64)), tree(tmp_path/'large', 4, (65, 64), ext='jpg')
    kind = lambda *a, **k: type(get_dls(*a, bs=4, **CPU, **k).train_ds)
    assert kind(small) is ImageArray and kind(small, size=65) is ImageFiles and kind(small, cache=False) is ImageFiles
    assert kind(large) is ImageFiles and kind(large, size=32) is ImageFiles and kind(large, cache=True) is ImageArray
    assert get_dls(large, bs=4, **CPU).size == 224

@pytest.mark.parametrize('mode,ext', [('L', 'png'), ('RGBA', 'png'), ('P', 'gif'), ('CMYK', 'jpg'), ('1', 'png'), ('I;16', 'png')])
def test_colour_modes_become_rgb(root, mode, ext):
    im = Image.open(root/'train/a/000.png')
    (Image.fromarray(np.zeros((12, 12), np.uint16)) if mode=='I;16' else im.convert(mode)).save(root/f'train/a/odd.{ext}')
    for kw in (dict(), dict(cache=False, size=12)): assert pixels(get_dls(root, bs=1, **CPU, **kw).train).shape == (41, 3, 12, 12)

def test_evaluation_matches_torchvision(tmp_path):
    from torchvision import transforms as T
    dls = get_dls(tree(tmp_path/'t', 2, (300, 281)), bs=4, **CPU)
    tfm = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    want = torch.stack([tfm(Image.open(f)) for f in dls.valid_ds.files])
    assert torch.allclose(pixels(dls.valid), want, atol=1e-5)

def test_sixteen_bits_and_turned_cameras(tmp_path):
    v = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(v).save(tmp_path/'a.png'); Image.fromarray(v).save(tmp_path/'a.tif'); Image.fromarray(v.astype(np.int32)).save(tmp_path/'b.tif')
    for f in 'a.png', 'a.tif', 'b.tif': assert np.array_equal(np.asarray(open_rgb(tmp_path/f))[..., 1], v//257)
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for code, want in {1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 6: np.rot90(rgb, -1), 8: np.rot90(rgb)}.items():
        exif = Image.Exif(); exif[0x112] = code
        Image.fromarray(rgb).save(tmp_path/'c.png', exif=exif)
        assert np.array_equal(np.asarray(open_rgb(tmp_path/'c.png')), want), code
    Image.fromarray(v.astype(np.int32)*2**10).save(tmp_path/'e.tif')
    with pytest.raises(ValueError, match='beyond 16 bits'): open_rgb(tmp_path/'e.tif')
    Image.fromarray(rgb).save(tmp_path/'d.png', exif=b'Exif\0\0II*\0\x08\0\0\0\xff\xff')  # damaged EXIF, whole pixels
    assert np.array_equal(np.asarray(open_rgb(tmp_path/'d.png')), rgb)

def test_sixteen_bits_of_a_grey_image():
    "A network of grey images sees what one of colour does"
    v = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    x = ImageArray(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ['a', 'b']).unlabelled([Image.fromarray(v)]).x
    assert np.array_equal(x[0, 0], v//257)

def test_small_images_of_a_turned_camera(root):
    "The size that they share is that of the pictures, not of what their headers claim"
    exif = Image.Exif(); exif[0x112] = 6
    for f in [*root.rglob('*.png')]:
        Image.new('RGB', (16, 12), 'red').save(f.with_suffix('.jpg'), exif=exif); f.unlink()
    assert get_dls(root, bs=8, **CPU).train_ds.x.shape[1:] == (3, 16, 12)

def test_floating_point_images_are_unreadable(root):
    "Their range is not known: better named than black"
    f = root/'train/a/003.tif'; Image.fromarray(np.linspace(0, 1, 144, dtype=np.float32).reshape(12, 12)).save(f)
    with pytest.raises(ValueError, match='floating-point'): open_rgb(f)
    with pytest.warns(UserWarning, match='1 of 41 images cannot be read: .*003.tif'): assert len(get_dls(root, bs=8, **CPU).train_ds) == 40
    with pytest.warns(UserWarning, match='003.tif cannot be read .floating-point'): get_dls(root, bs=41, cache=False, size=12, **CPU).one_batch()

def test_unreadable_images_in_a_run(root, tmp_path):
    "Training and validation, from files and in memory: counted in the row, named in the folder"
    from repq.recipes import get_recipe
    from repq.runs import eval_run, train
    bad = [root/f'{s}/a/003.png' for s in ('train', 'val')]
    for f in bad: f.write_bytes(b'')
    for name, size in dict(memory=12, files=72).items():
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); row = train(get_recipe('repvgg_a0_tiny', 'repq-bn', data=str(root), image_size=size, batch_size=20, epochs=1), tmp_path/name, on_epoch=lambda *a: None, timing=0)
        assert row['unreadable_images'] == 2 and (tmp_path/name/'unreadable.txt').read_text().splitlines() == sorted(map(str, bad))
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); assert eval_run(tmp_path/name)['images'] == 39
    for f in bad: f.unlink()
    assert train(get_recipe('repvgg_a0_tiny', 'repq-bn', data=str(root), image_size=12, batch_size=20, epochs=1), tmp_path/'clean', on_epoch=lambda *a: None, timing=0)['unreadable_images'] == 0
    assert not (tmp_path/'clean/unreadable.txt').exists()

@pytest.mark.parametrize('ext', ['jpg', 'png', 'webp', 'gif', 'tif', 'bmp'])
def test_damaged_files_are_skipped_whatever_pillow_raises(tmp_path, ext):
    "Files with some wrong bytes, or cut: decoded or skipped, nothing else"
    import random
    root, rng = tree(tmp_path/'t', 30, (40, 40), ext=ext), random.Random(0)
    whole = (root/f'train/a/000.{ext}').read_bytes()
    for i in range(6):
        data = bytearray(whole)
        for _ in range(4): data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        (root/f'train/a/{i:03d}.{ext}').write_bytes(data[:rng.randrange(1, len(data))] if i % 2 else data)
    dls = get_dls(root, bs=20, cache=False, size=32, **CPU)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        n = sum(len(y) for _, y in dls.train)
    assert n == 60 and 1 <= len(dls.train_ds.unreadable) <= 6

def test_workers_count_unreadable_images_together(root):
    bad = [root/f'train/{c}/{i:03d}.png' for c in 'ab' for i in (1, 2)]
    for f in bad: f.write_bytes(b'')
    dls = get_dls(root, bs=4, cache=False, size=12, num_workers=2, device='cpu')
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); list(dls.train)
    assert sorted(map(str, bad)) == sorted(map(str, dls.train_ds.unreadable))
    (root/'train/a/003.png').write_bytes(b'')
    with warnings.catch_warnings(), pytest.raises(ValueError, match='5 of 40 images cannot be read.*more than a tenth'): warnings.simplefilter('ignore'); list(dls.train)

@pytest.mark.parametrize('workers', [0, 2])
def test_a_batch_without_a_readable_image(root, workers):
    "In training the next images stand in, in validation the batch is left out"
    for s in 'train', 'val':
        for i in 0, 1: (root/f'{s}/a/{i:03d}.png').write_bytes(b'')
    dls = get_dls(root, bs=2, cache=False, size=12, num_workers=workers, device='cpu', normalize=False)
    ds, train = dls.valid_ds, dls.train.new(shuffle=False, augment=False)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); x, (batches, seen) = next(iter(train))[0], zip(*[(1, len(y)) for _, y in dls.valid])
    assert torch.equal((x*255).round().byte(), dls.train_ds.batch([2, 2])[0]) and (sum(batches), sum(seen)) == (19, 38)
    assert [len(ds.batch(o, 'key')[1]) for o in ([0, 1], [1, 2], [2, 3])] == [0, 1, 2] and ds[0][1] == 0

def test_shares_have_the_same_stand_ins(root):
    "Which image stands in, and its crop, don't depend on the number of processes; nor do sizes of batches"
    for n in ('a/000', 'a/001', 'b/007', 'b/019'): (root/f'train/{n}.png').write_bytes(b'')  # the last one too: the first stands in
    for kw in dict(), dict(augment=False):
        whole, *parts = [get_dls(root, bs=8, seed=3, cache=False, size=12, **CPU, **kw).train for _ in range(5)]
        for rank, o in enumerate(parts): o.share = rank, 4
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for (x, y), *b in zip(whole, *parts, strict=True):
                assert len(y) == 8 and all(len(v) == 2 for _, v in b)
                assert torch.equal(x, torch.cat([o[0] for o in b])) and torch.equal(y, torch.cat([o[1] for o in b]))
        assert len(whole.dataset.unreadable) == 4 == len({f for o in parts for f in o.dataset.unreadable})

# --- shares of data-parallel processes and of resumed epochs

@pytest.mark.parametrize('kw', [dict(), dict(cache=False, size=12)])
def test_shares_are_parts_of_the_batch(root, kw):
    whole, *parts = [get_dls(root, bs=9, valid_bs=7, seed=3, **CPU, **kw) for _ in range(4)]
    for rank, o in enumerate(parts): o.train.share = o.valid.share = rank, 3
    for _ in range(2): assert torch.equal(pixels(whole.train), torch.cat([x for xs in zip(*(o.train for o in parts)) for x, _ in xs]))
    dealt = [[x for x, _ in o.valid] for o in parts]
    assert torch.equal(pixels(whole.valid), torch.cat([dealt[i % 3][i//3] for i in range(6)]))

@pytest.mark.parametrize('workers', [0, 2])
def test_the_rest_of_an_epoch(root, workers):
    dls = get_dls(root, bs=8, seed=3, num_workers=workers, device='cpu')
    first, second = pixels(dls.train), pixels(dls.train)
    dls.train.epoch, dls.train.skip = -1, 3
    dls.train.one_batch()                                          # looking still changes nothing
    assert torch.equal(first[24:], pixels(dls.train)) and torch.equal(second, pixels(dls.train))
    dls.train.skip = 5
    assert not list(dls.train)

# --- reproducibility

@pytest.mark.parametrize('kw', [dict(), dict(cache=False, size=12)])
def test_seed(root, kw):
    one,two = [get_dls(root, bs=8, seed=3, **CPU, **kw) for _ in range(2)]
    other = get_dls(root, bs=8, seed=4, **CPU, **kw)
    first = pixels(one.train)
    for _ in range(3): two.train.one_batch()                       # looking changes nothing
    torch.rand(5); np.random.rand(5)
    assert torch.equal(first, pixels(two.train))
    second = pixels(one.train)
    assert torch.equal(second, pixels(two.train)) and not torch.equal(first, second)
    assert not torch.equal(first, pixels(other.train))
    resumed = get_dls(root, bs=8, seed=3, **CPU, **kw)
    resumed.train.epoch = 0
    assert torch.equal(second, pixels(resumed.train))

def test_workers_change_nothing(root):
    for kw in (dict(), dict(cache=False, size=12)):
        a,b = [get_dls(root, bs=8, seed=3, num_workers=n, device='cpu', **kw) for n in (0, 2)]
        assert torch.equal(pixels(a.train), pixels(b.train)) and torch.equal(pixels(a.valid), pixels(b.valid))

def test_abandoned_epoch_is_an_epoch(root):
    dl = get_dls(root, bs=8, seed=0, **CPU).train
    a = next(iter(dl)); b = next(iter(dl))
    assert dl.epoch == 1 and not torch.equal(a[0], b[0])

def test_no_seed_follows_python_random(root):
    import random
    random.seed(5); a = get_dls(root, bs=8, **CPU); random.seed(5); b = get_dls(root, bs=8, **CPU)
    assert a.train.seed == b.train.seed != get_dls(root, bs=8, **CPU).train.seed

# --- the cache

def test_cache_is_used_and_refreshed(root, own_cache, monkeypatch):
    get_dls(root, bs=8, **CPU)
    assert len(list(own_cache.glob('*.safetensors'))) == 2 and not list(own_cache.glob('*.tmp'))
    calls = []
    decode = D.decode_images
    monkeypatch.setattr(D, 'decode_images', lambda *a, **k: calls.append(a) or decode(*a, **k))
    get_dls(root, bs=8, **CPU); assert not calls
    save(root/'train/a/000.png', value=9); x = get_dls(root, bs=8, **CPU).train_ds.x
    assert len(calls) == 1 and (x[0]==9).all()                     # only the split that changed
    (root/'val/b/019.png').unlink(); assert len(get_dls(root, bs=8, **CPU).valid_ds) == 39
    get_dls(root, bs=8, size=8, **CPU); assert len(calls) == 4

@pytest.mark.parametrize('damage', [b'', b'junk', None])
def test_damaged_cache(root, own_cache, damage):
    x = get_dls(root, bs=8, **CPU).train_ds.x
    for f in own_cache.iterdir(): f.write_bytes(f.read_bytes()[:500] if damage is None else damage)
    assert torch.equal(get_dls(root, bs=8, **CPU).train_ds.x, x)

@pytest.mark.parametrize('change', [lambda x: x[..., :0], lambda x: x[:, :, :1], lambda x: x[:, :1], lambda x: x[1:], lambda x: x.float()])
def test_cache_of_other_images(root, own_cache, change):
    "A cache with the right fingerprint and the wrong tensors is made again"
    x = get_dls(root, bs=8, size=12, **CPU).train_ds.x
    for f in own_cache.iterdir():
        with safe_open(f, 'pt') as o: marks, ok = o.metadata(), o.get_tensor('ok')
        save_file(dict(x=change(load_file(f)['x']).contiguous(), ok=ok), f, marks)
    assert torch.equal(get_dls(root, bs=8, size=12, **CPU).train_ds.x, x)

def test_cache_in_no_home(root, monkeypatch):
    monkeypatch.setenv('REPQ_CACHE', '~nobodyatall/x')
    with pytest.raises(ValueError, match='~nobodyatall/x is in a home that is not known'): get_dls(root, bs=8, **CPU)

def test_cache_that_cannot_be_written(root, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('REPQ_CACHE', str(tmp_path/'file/below'))
    with pytest.warns(UserWarning, match='cannot be kept'): assert len(get_dls(root, bs=8, **CPU).train_ds) == 40

def test_decoding_in_threads_leaves_warnings_alone(root):
    before = list(warnings.filters)
    for _ in range(20): decode_images(list_images(root/'train')[0], threads=8)
    assert list(warnings.filters) == before

# --- splits

def test_validation_folder(tmp_path):
    for name in ('test', 'validation', 'valid', 'val'):            # each wins over those before it
        tree(tmp_path/'t', 3, splits=('train', name)); save(tmp_path/'t'/name/'a'/f'only_{name}.png')
        files = split_folders(tmp_path/'t')[1]
        assert files.name == name
    assert split_folders(tmp_path/'t', 'test')[1].name == 'test'

@pytest.mark.parametrize('kw', [dict(), dict(cache=False, size=12)])
def test_fraction(root, kw):
    dls = get_dls(root, bs=8, valid=.1, **CPU, **kw)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (36, 4) and dls.valid_ds.y.tolist() == [0, 0, 1, 1]
    again = get_dls(root, bs=8, valid=.1, seed=9, **CPU, **kw)
    assert torch.equal(pixels(dls.valid), pixels(again.valid))

def test_digits():
    dls = get_dls('digits', bs=64, **CPU)
    assert (dls.c, dls.size, dls.in_channels, len(dls.train_ds)+len(dls.valid_ds)) == (10, 8, 1, 1797)
    assert not dls.train_ds.flip and f'{len(dls.train_ds):,} training' in DATASETS['digits']
    train = {x.numpy().tobytes() for x in dls.train_ds.x}
    assert sum(x.numpy().tobytes() in train for x in dls.valid_ds.x) == 0
    assert len(get_dls('digits', valid=.5, **CPU).valid_ds) > 880

def test_nested_folders_and_hidden_files(root):
    save(root/'train/a/deep/er/0.png'); save(root/'train/.ipynb_checkpoints/0.png'); save(root/'train/b/._x.png')
    assert len(get_dls(root, bs=8, **CPU).train_ds) == 41

def test_empty_validation_class_says_it_is_meant(root):
    for f in (root/'val/b').iterdir(): f.unlink()
    assert get_dls(root, bs=8, **CPU).valid_ds.y.tolist() == [0]*20

# --- bad input

def test_missing_path(tmp_path, root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(FileNotFoundError, "no folder 'digit'; did you mean 'digits'", 'digit')
    fails(FileNotFoundError, "did you mean 'tree'", 'treee')
    fails(FileNotFoundError, 'known names: digits, cifar10, imagenette', '/no/such/place')
    fails(NotADirectoryError, 'is a file; unpack it', root/'train/a/000.png')

def test_tree_without_splits(tmp_path, root):
    fails(FileNotFoundError, 'no train/ folder; it has a/, b/', root/'train')
    fails(FileNotFoundError, 'no validation folder .*; it has train/', tree(tmp_path/'t', 2, splits=('train',)))
    fails(FileNotFoundError, r'no validation folder \(dev/\)', root, valid='dev')
    (tmp_path/'e/train').mkdir(parents=True); (tmp_path/'e/val').mkdir()
    fails(ValueError, 'no class folders', tmp_path/'e')
    (tmp_path/'e/train/a').mkdir(); (tmp_path/'e/val/a').mkdir()
    fails(ValueError, 'class folder .*train/a has no images', tmp_path/'e')
    save(tmp_path/'e/train/a/0.png')
    fails(ValueError, 'val has no images', tmp_path/'e')

def test_validation_is_not_training(root):
    shutil.rmtree(root/'val'); (root/'val').symlink_to('train')
    fails(ValueError, 'val is .*train: validation needs other images', root)
    assert len(get_dls(root, bs=8, valid=.5, **CPU).valid_ds) == 20

def test_classes_differ(root):
    save(root/'val/c/0.png')
    fails(ValueError, 'val has 1 class folders that train/ lacks: c', root)
    save(root/'train/c/0.png'); save(root/'train/d/0.png')
    fails(ValueError, r'val lacks 1 class folders of train/: d', root)

def test_other_files_are_counted(root):
    for n in ('a.txt', 'b.csv'): (root/'train/a'/n).write_text('x')
    with pytest.warns(UserWarning, match='no images: 2'): assert len(get_dls(root, bs=8, **CPU).train_ds) == 40

def test_folder_without_permission(root, monkeypatch):
    scandir = os.scandir
    def denied(p='.'):
        if Path(p).name=='b': raise PermissionError(13, 'Permission denied', str(p))
        return scandir(p)
    monkeypatch.setattr(os, 'scandir', denied)
    fails(PermissionError, 'no permission to read the folder .*b', root)

@pytest.mark.parametrize('data', [b'', b'not an image', 'half'])
def test_unreadable_images(root, data):
    f = root/'train/a/003.png'
    f.write_bytes(f.read_bytes()[:200] if data=='half' else data)
    for _ in range(2):                                             # decoded, then from the cache
        with pytest.warns(UserWarning, match='1 of 40 images cannot be read: .*003.png'): dls = get_dls(root, bs=8, **CPU)
        assert len(dls.train_ds) == 39 and dls.train_ds.y.tolist() == [0]*19 + [1]*20
        assert unreadable(dls) == dls.train_ds.unreadable == [str(f)] and unreadable(dls.new_empty()) == [str(f)]
        with pytest.warns(UserWarning): assert unreadable(get_dls(root, bs=8, valid=.25, **CPU)) == [str(f)]  # once, not for both parts
    dls = get_dls(root, bs=40, cache=False, size=12, **CPU)
    with pytest.warns(UserWarning, match='003.png cannot be read'): x,y = dls.one_batch()
    assert len(x)==len(y)==40 and y.sum() == 20 and unreadable(dls) == [str(f)]
    for i in range(5): (root/f'train/b/{i:03d}.png').write_bytes(b'')
    fails(ValueError, '6 of 40 images cannot be read: .*, ...; more than a tenth', root)
    with warnings.catch_warnings(), pytest.raises(ValueError, match='more than a tenth'):
        warnings.simplefilter('ignore'); pixels(dls.train)
    for f in root.glob('train/*/*'): f.write_bytes(b'')
    fails(ValueError, 'none of 40 images can be read', root)

def test_sizes_differ(root, tmp_path):
    save(root/'train/b/007.png', (9, 13))
    fails(ValueError, '12×12, 9×13.* size=12', root)
    assert get_dls(root, size=10, bs=8, **CPU).one_batch()[0].shape == (8, 3, 10, 10)
    tree(tmp_path/'t', 3); tree(tmp_path/'t', 3, (8, 8), splits=('val',))
    fails(ValueError, '12×12, 8×8', tmp_path/'t')

def test_too_large_for_memory(root, monkeypatch):
    monkeypatch.setattr(os, 'sysconf', lambda name: 64)
    fails(ValueError, 'cache=False reads files', root)

@pytest.mark.parametrize('kw,match', [
    (dict(bs=41), 'bs=41 is more than the 40 training images'), (dict(bs=0), 'bs must be'), (dict(bs=1.5), 'bs must be'), (dict(bs=None), 'bs must be'),
    (dict(valid_bs=-1), 'valid_bs must be'), (dict(size=0), 'size must be'), (dict(size=-3), 'size must be'), (dict(size='big'), 'size must be'),
    (dict(num_workers=-1), 'num_workers must be'), (dict(seed='x'), 'seed must be'), (dict(valid=0.), 'valid must be'), (dict(valid=1.), 'valid must be'),
    (dict(valid=2), 'valid must be'), (dict(valid=.01), 'holds out no image'), (dict(cache='no'), 'cache must be'),
    (dict(normalize=([1], [1])), 'normalize must be'), (dict(normalize=([0]*3, [0]*3)), 'normalize must be'), (dict(normalize='imagenet'), 'normalize must be')])
def test_arguments(root, kw, match): fails(ValueError, match, root, **kw)

def test_digits_arguments():
    fails(ValueError, '8×8', 'digits', size=32)
    fails(ValueError, "no folder 'test'", 'digits', valid='test')

@pytest.mark.parametrize('name', ['cifar10', 'imagenette'])
def test_no_network(name, monkeypatch):
    def offline(url): raise OSError('Name or service not known')
    monkeypatch.setattr(D, 'untar_data', offline)
    fails(ConnectionError, f"cannot fetch '{name}' .Name or service not known.: without a network, give the path", name)

def test_names_are_fetched_and_paths_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetched = tree(tmp_path/'fetched', 3)
    tree(tmp_path/'cifar10', 4)
    monkeypatch.setattr(D, 'untar_data', lambda url: fetched)
    assert len(get_dls('cifar10', bs=2, **CPU).train_ds) == 6 and len(get_dls('./cifar10', bs=2, **CPU).train_ds) == 8
    assert len(get_dls(Path('cifar10'), bs=2, **CPU).train_ds) == 8

# --- fastai

def test_learner_trains(root):
    from fastai.callback import progress, schedule # noqa: F401 (they patch Learner)
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from torch import nn
    torch.manual_seed(0)
    dls = get_dls('digits', bs=64, seed=0, **CPU)
    net = nn.Sequential(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(256, dls.c))
    learn = Learner(dls, net, metrics=accuracy, path=root)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
        preds,targs = learn.get_preds()
        assert learn.validate()[1] > .7 and torch.equal(targs, dls.valid_ds.y)
        assert len(learn.get_preds(ds_idx=0)[0]) == len(dls.train_ds)
    learn.export(root/'learn.pkl')
    assert dls.train.epoch == 0

def test_show_batch(root):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    for dls in (get_dls('digits', **CPU), get_dls(root, bs=4, **CPU)): dls.show_batch(); dls.valid.show_batch(max_n=3); plt.close('all')

def test_imagenet_sample(imagenet_sample):
    dls = get_dls(imagenet_sample, bs=4, seed=0, **CPU)
    x,y = dls.one_batch()
    assert x.shape == (4, 3, 224, 224) and .5 < x.std() < 2 and dls.vocab[0].startswith('n01')
