"repq.shards on small trees: the same batches and the same training as from the folder, damage, tar files of others, webdataset"
import io, tarfile, warnings
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from repq.data import get_dls, list_images, open_crop, read_shards, rng_at
from repq.shards import bench_data, picture_difference, write_shards

CPU = dict(device='cpu', num_workers=0)

@pytest.fixture
def root(tmp_path, monkeypatch):
    "Two classes, JPEGs and PNGs of 70 to 100 pixels, names with dots, a folder in a folder"
    monkeypatch.setenv('REPQ_CACHE', str(tmp_path/'cache'))
    for s, split in enumerate(('train', 'val')):
        for c in 'ab':
            for i in range(12):
                f = tmp_path/'tree'/split/c/('deep' if i % 5 == 4 else '')/(f'{i:02d}.x.jpg' if i % 2 else f'{i:02d}.png')
                f.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.random.default_rng(100*s + i).integers(0, 256, (70 + i, 100, 3), dtype=np.uint8)).save(f)
    return tmp_path/'tree'

def batches(dl): return [t for b in dl for t in b]

def same(a, b): return len(a) == len(b) and all(map(torch.equal, a, b))

@pytest.mark.parametrize('kw', [dict(size=64, cache=False), dict(size=32), dict(size=64, cache=False, valid=.25)])
def test_same_batches(root, tmp_path, kw):
    write_shards(root, tmp_path/'shards', size=1e5)
    assert len(list((tmp_path/'shards').glob('train-*.tar'))) > 1
    a, b = [get_dls(o, bs=4, seed=3, device='cpu', num_workers=n, **kw) for o, n in ((root, 0), (tmp_path/'shards', 2))]
    for _ in range(2): assert same(batches(a.train), batches(b.train))
    assert same(batches(a.valid), batches(b.valid)) and a.vocab == b.vocab
    for o in a, b: o.train.epoch, o.train.skip, o.train.share = 4, 2, (1, 2)
    assert same(batches(a.train), batches(b.train))

def test_same_training(root, tmp_path):
    from repq.recipes import get_recipe
    from repq.runs import eval_run, load_run, train
    write_shards(root, tmp_path/'shards')
    kw = dict(image_size=64, batch_size=8, epochs=1, seed=0)
    for name, data in (('a', root), ('b', tmp_path/'shards')): train(get_recipe('repvgg_a0_tiny', 'repq-bnest', 32, data=str(data), **kw), tmp_path/name, timing=0)
    a, b = [load_run(tmp_path/o)[1].state_dict() for o in 'ab']
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert eval_run(tmp_path/'a', str(tmp_path/'shards'))['accuracy'] == eval_run(tmp_path/'b')['accuracy']

def test_damaged_images_are_skipped_and_named(root, tmp_path):
    (root/'train/a/00.png').write_bytes(b'')
    f = root/'train/b/01.x.jpg'; f.write_bytes(f.read_bytes()[:900])
    with pytest.warns(UserWarning, match='2 of 48 images cannot be read.*packed as they are'): r = write_shards(root, tmp_path/'shards')
    assert [str(o) for o in r['unreadable']] == [str(root/'train/a/00.png'), str(f)]
    dls = get_dls(tmp_path/'shards', bs=24, size=64, cache=False, seed=0, **CPU)
    with pytest.warns(UserWarning, match='shards/train-000000.tar/a/00.png cannot be read'): x, y = dls.one_batch()
    assert len(y) == 24 and sorted(Path(o).name for o in dls.train_ds.unreadable) == ['00.png', '01.x.jpg']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert same(batches(dls.train), batches(get_dls(root, bs=24, size=64, cache=False, seed=0, **CPU).train))

def test_too_many_damaged_images_leave_nothing_behind(root, tmp_path):
    for f in list((root/'train/a').glob('*.*'))[:6]: f.write_bytes(b'x')
    with pytest.raises(ValueError, match='more than a tenth'): write_shards(root, tmp_path/'new/shards')
    assert not (tmp_path/'new').exists()

@pytest.mark.parametrize('index', [True, False])
def test_a_shard_that_is_cut_off(root, tmp_path, index):
    out = tmp_path/'shards'
    write_shards(root, out)
    if not index: (out/'index.json').unlink()
    tar = out/'train-000000.tar'; tar.write_bytes(tar.read_bytes()[:150_000])
    with pytest.raises(ValueError, match='train-000000.tar .*cut off.* copy it again, or make the shards again') as e: get_dls(out, bs=4, **CPU)
    assert '\n' not in str(e.value)
    if index:
        tar.unlink()
        with pytest.raises(FileNotFoundError, match='train-000000.tar is missing'): get_dls(out, bs=4, **CPU)

def test_index_made_from_the_tars_is_the_same(root, tmp_path, monkeypatch):
    monkeypatch.setenv('REPQ_CACHE', str(tmp_path/'cache'))
    out = tmp_path/'shards'
    write_shards(root, out, size=1e5)
    kept = read_shards(out)
    (out/'index.json').unlink()
    again = read_shards(out)
    assert not (out/'index.json').exists() and len(list((tmp_path/'cache').glob('*.index.json'))) == 1, 'kept in the cache'
    for k in kept: assert [vars(o) | dict(n=str(o)) for o in kept[k][0]] == [vars(o) | dict(n=str(o)) for o in again[k][0]] and torch.equal(kept[k][1], again[k][1])
    (out/'index.json').write_text('{')
    with pytest.raises(ValueError, match='index.json is damaged .*delete it'): read_shards(out)

def test_links_to_nowhere(root, tmp_path):
    "One dangling link is one unreadable image: packed as an empty file, skipped in training, in memory and by the benchmark"
    f = root/'train/a/00.png'; f.unlink(); f.symlink_to(root/'no')
    (root/'train/a/.hidden.jpg').write_bytes(b''); Image.new('RGB', (80, 80)).save(root/'train/b/anim.gif') # torchvision has the first, not the second
    with pytest.warns(UserWarning, match='1 of 49 images cannot be read.*00.png'): r = write_shards(root, tmp_path/'shards')
    assert r['unreadable'] == [str(f)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for kw in dict(size=64, cache=False), dict(size=32):
            a, b = [get_dls(o, bs=4, seed=3, **CPU, **kw) for o in (root, tmp_path/'shards')]
            assert same(batches(a.train), batches(b.train)) and [Path(o).name for o in b.train_ds.unreadable] == ['00.png']
        assert [(o['loader'], o['images']) for o in bench_data(root, tmp_path/'shards', size=64, rounds=1)[:3]] == [('torchvision', 24), ('repq', 24), ('repq, shards', 24)]

# Tar files of others

def foreign(out, tars):
    "tar file -> {member: bytes, or a label}; images get a brightness that tells their class"
    for tar, members in tars.items():
        (out/tar).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out/tar, 'w') as t:
            for name, v in members.items():
                data = v.encode() if isinstance(v, str) else b''
                if isinstance(v, int): im = io.BytesIO(); Image.new('RGB', (20, 20), (10 + 50*v,)*3).save(im, 'png' if name.endswith('png') else 'jpeg'); data = im.getvalue()
                info = tarfile.TarInfo(name); info.size = len(data); t.addfile(info, io.BytesIO(data))
    return out

def shades(path, **kw):
    "Class name -> brightness of its images, of both splits; fails where a class has several"
    dls = get_dls(path, bs=2, normalize=False, augment=False, valid=None, **CPU)
    res = {}
    for ds in dls.train_ds, dls.valid_ds:
        for x, y in zip(ds.x, ds.y): assert res.setdefault(ds.vocab[y], round((x.float().mean().item() - 10)/50)) == round((x.float().mean().item() - 10)/50)
    return res, len(dls.train_ds), len(dls.valid_ds)

def both(f, n=6): return {f'{s}-0.tar': dict(o for i in range(n) for o in f(s, i, i % 3)) for s in ('train', 'val')}

LAYOUTS = dict(
    one_folder=lambda s, i, c: [(f'images/{i}.jpg', c), (f'images/{i}.cls', str(c))], # the label counts
    parts=lambda s, i, c: [(f'part{i//3}/{i}.jpg', c), (f'part{i//3}/{i}.cls', str(c))],
    seg=lambda s, i, c: [(f'{i}.seg.png', 5), (f'{i}.jpg', c), (f'{i}.depth.png', 5), (f'{i}.cls', str(c)), (f'{i}.json', '{}')],
    seg_first=lambda s, i, c: [(f'x/{i}.png', 5), (f'x/{i}.jpg', c), (f'x/{i}.cls', str(c))], # JPEG before PNG
    inputs=lambda s, i, c: [(f'{i}.input.jpg', c), (f'{i}.target.cls', str(c))],
    hidden=lambda s, i, c: [(f'./._{i}.jpg', 5), (f'./{i}.jpg', c), (f'./{i}.cls', str(c))])

@pytest.mark.parametrize('name', LAYOUTS)
def test_labels_of_others(tmp_path, name):
    with warnings.catch_warnings(record=True) as said: warnings.simplefilter('always'); r = shades(foreign(tmp_path, both(LAYOUTS[name])))
    assert r == ({'0': 0, '1': 1, '2': 2}, 6, 6)
    passed = dict(seg=24, seg_first=12).get(name)
    assert [f'{passed} images passed over' in str(o.message) for o in said if 'passed' in str(o.message)] == ([True] if passed else [])

@pytest.mark.parametrize('above', ['', 'imagenet/'])
def test_split_folders_inside(tmp_path, above):
    members = lambda s, i, c: [(f'{above}{s}/n{c}/{"deep/" if i % 2 else ""}{i}.jpg', c)]
    tars = both(members)
    assert shades(foreign(tmp_path/'two', tars)) == ({'n0': 0, 'n1': 1, 'n2': 2}, 6, 6)
    assert shades(foreign(tmp_path/'one', {'all.tar': {**tars['train-0.tar'], **tars['val-0.tar']}})) == ({'n0': 0, 'n1': 1, 'n2': 2}, 6, 6)
    plain = {k: v for k, v in both(lambda s, i, c: [(f'n{c}/{i}.jpg', c)]).items() if k != 'train-0.tar'}
    assert shades(foreign(tmp_path/'mixed', {'train-0.tar': tars['train-0.tar'], **plain})) == ({'n0': 0, 'n1': 1, 'n2': 2}, 6, 6)

def test_folders_that_agree_with_labels_name_the_classes(tmp_path):
    "Then the order is the labels'; and a class may be called as a split"
    names = ['zebra', 'train', 'ant']
    foreign(tmp_path, both(lambda s, i, c: [(f'{names[c]}/deep/{i}.jpg', c), (f'{names[c]}/deep/{i}.cls', str(c))]))
    assert shades(tmp_path) == (dict(zebra=0, train=1, ant=2), 6, 6) and get_dls(tmp_path, bs=2, **CPU).vocab == names

@pytest.mark.parametrize('tars,error,match', [
    ({'shard-0.tar': {'a/1.jpg': 0, 'b/2.jpg': 1}, 'x.tar': {'notes.txt': 'x'}}, FileNotFoundError, 'no shards for training: looked .* train and val, valid, validation, test; found shard: 2 images, in shard-0.tar; rename'),
    ({'train-0.tar': {'notes.txt': 'x'}}, FileNotFoundError, 'found no images'),
    ({'train-0.tar': {'images/1.jpg': 0, 'images/2.jpg': 1}}, ValueError, 'all images for training are in one folder, images/'),
    ({'train-0.tar': {'1.jpg': 0, '1.json': '{}'}}, ValueError, '1.jpg is in no class folder and has no 1.cls'),
    *(({'train-0.tar': {'1.jpg': 0, '1.cls': label}}, ValueError, 'what 1.cls holds is no label') for label in ('', ' \n', '\0')),
    ({'train-0.tar': {'1.left.jpg': 0, '1.right.jpg': 1, '1.cls': '0'}}, ValueError, 'which image of 1 is meant.*1.left.jpg, 1.right.jpg'),
    ({'train-000000.tar.gz': {}, 'val-000000.tar.gz': {}}, ValueError, 'compressed shards .*tar.gz, .*at random places: unpack'),
    ({'train-0.tar': {'a/1.jpg': 0}, 'train-1.tgz': {}}, ValueError, 'compressed shards .train-1.tgz.')])
def test_tars_that_cannot_be_used(tmp_path, tars, error, match):
    with pytest.raises(error, match=match) as e: get_dls(foreign(tmp_path, tars), bs=2, **CPU)
    assert '\n' not in str(e.value) and not (tmp_path/'index.json').exists()

def test_dots_in_names_are_no_samples(root, tmp_path):
    "A folder packed by tar: images with dots in their names are images of their own"
    foreign(tmp_path, {f'{s}-0.tar': {f'{c}/x.{i}.jpg': j for j, c in enumerate('ab') for i in range(4)} for s in ('train', 'val')})
    assert shades(tmp_path) == (dict(a=0, b=1), 8, 8)

def test_arguments(root, tmp_path):
    write_shards(root, tmp_path/'shards')
    for args, match in (((root, tmp_path/'shards'), 'exists'), ((tmp_path/'shards', tmp_path/'x'), 'folder of shards already'), ((root, tmp_path/'x', 0), 'size must be above 0')):
        with pytest.raises((ValueError, FileExistsError), match=match): write_shards(*args)
    with pytest.raises(FileNotFoundError, match='no validation folder .dev/.; it has train/, val/'): get_dls(tmp_path/'shards', bs=4, valid='dev', **CPU)
    with pytest.raises(FileNotFoundError, match='no train/ folder'): write_shards(root/'train', tmp_path/'x')
    for args, kw, match in (((tmp_path/'shards',), {}, 'which torchvision cannot read'), ((root,), dict(images=0), 'images must be a whole number, from 1 to 100,000, not 0'), ((root,), dict(rounds=0), 'rounds must'), ((Path('digits'),), {}, 'the digits are embedded')):
        with pytest.raises(ValueError, match=match): bench_data(*args, **kw)
    with pytest.raises(ValueError, match='the digits are embedded'): write_shards('digits', tmp_path/'x')
    with pytest.raises(FileNotFoundError, match="no folder 'imagenette'; known names"): bench_data(Path('imagenette'))

def test_a_folder_with_tars_beside_train_is_a_folder(root):
    (root/'raw.tar').write_bytes(b'no tar')
    assert read_shards(root) is None and not (root/'index.json').exists()

def test_webdataset_reads_the_shards(root, tmp_path):
    wds = pytest.importorskip('webdataset')
    write_shards(root, tmp_path/'shards')
    samples = list(wds.WebDataset(str(tmp_path/'shards/train-000000.tar'), shardshuffle=False))
    files, y, _ = list_images(root/'train')
    assert [int(s['cls']) for s in samples] == y.tolist()
    assert [s.get('jpg') or s['png'] for s in samples] == [Path(f).read_bytes() for f in files]

@pytest.mark.parametrize('code', [1, 3, 6, 8])
def test_crops_at_reduced_scale_show_what_full_ones_show(tmp_path, code):
    y, x = np.mgrid[:613, :801]
    exif = Image.Exif(); exif[0x112] = code
    Image.fromarray(np.stack([128 + 99*np.sin(x/31), 128 + 99*np.cos(y/47), 128 + 99*np.sin((x+y)/59)], -1).astype(np.uint8)).save(tmp_path/'a.jpg', quality=95, exif=exif)
    for i in range(8):
        a, b = [open_crop(tmp_path/'a.jpg', 64, rng_at(i), coarse=o).float() for o in (True, False)]
        assert (a - b).abs().mean() < 1.5, i
    assert picture_difference([tmp_path/'a.jpg'], 600)['reduced'] == 0

def test_imagenet_sample(imagenet_sample, tmp_path):
    write_shards(imagenet_sample, tmp_path/'shards')
    a, b = [get_dls(o, bs=8, seed=0, **CPU) for o in (imagenet_sample, tmp_path/'shards')]
    assert same(batches(a.train), batches(b.train)) and same(batches(a.valid), batches(b.valid))
    assert picture_difference(a.train_ds.files)['mean_abs'] < .1
