"Super-resolution: MATLAB's conventions against MATLAB's files, pairs of every layout, measures, tiles, colours, and what is wrong with a folder."
import shutil, warnings
import numpy as np, pytest, tarfile, torch
from PIL import Image
from torch import nn
from repq.data import open_rgb, unreadable
from repq.models import create_model
from repq.checkpoints import from_official, to_official
from repq.deployment import export_run, post_training
from repq.recipes import get_recipe
from repq.runs import eval_run, load_run, save_details, train
from repq.superres import (UNIT, Crops, bicubic, bicubic_image, evaluate_pairs, find_pairs, get_sr_dls, is_grey, load_benchmarks, load_pairs, luminance, make_pair, open_image, own_colours, psnr, reach, rgb_to_ycbcr, ssim, super_resolve, upscale, upscale_file)
from repq.surgery import calibrate, deploy, merge, quantize

rng = np.random.default_rng(0)
def picture(h, w, c=3): return Image.fromarray(rng.integers(0, 256, (h, w, c) if c > 1 else (h, w), dtype=np.uint8))
def tensor(path): return torch.from_numpy(np.asarray(Image.open(path).convert('RGB')).transpose(2, 0, 1).copy())

@pytest.fixture(scope='module')
def matlab(shared, tmp_path_factory):
    "Set5, Set14 and BSD100 with small images made by MATLAB"
    file = shared/'data'/'sr_test_x2.tar'
    if not file.exists(): pytest.skip(f'no {file}')
    folder = tmp_path_factory.mktemp('sr')
    with tarfile.open(file) as t: t.extractall(folder, filter='data')
    return folder/'sr_test_x2'

def test_bicubic_is_matlabs(matlab):
    "Not one value of Set5's and Set14's small images differs, borders included"
    for name in 'Set5', 'Set14':
        for n, hr, lr in find_pairs(matlab/name):
            small, large = tensor(lr), tensor(hr)
            h, w = small.shape[-2:]
            assert torch.equal(bicubic_image(large[:, :2*h, :2*w], (h, w)), small.float()), n

def test_bicubic_floor_is_the_known_one(matlab):
    r = evaluate_pairs(None, load_pairs(find_pairs(matlab/'Set5')), with_ssim=True)
    assert abs(r['psnr'] - 33.66) < .05 and abs(r['psnr_rounded'] - 33.66) < .05 and abs(r['ssim'] - .9299) < .001

def test_made_small_images_are_those_in_the_files(matlab, tmp_path):
    "A folder of large images alone gives the pairs that the benchmark has"
    for f in (matlab/'Set5'/'HR').iterdir(): shutil.copy(f, tmp_path/f.name)
    for p, q in zip(load_pairs(find_pairs(tmp_path)), load_pairs(find_pairs(matlab/'Set5'))): assert torch.equal(p.lr, q.lr) and torch.equal(p.hr, q.hr)

def test_bicubic_against_its_definition():
    "The cubic kernel with a = -1/2, stretched when shrinking, outermost pixels repeated: every weight by itself"
    def cubic(t): t = abs(t); return 1.5*t**3 - 2.5*t**2 + 1 if t <= 1 else -.5*t**3 + 2.5*t**2 - 4*t + 2 if t < 2 else 0.
    def axis(n, out):
        s, m = min(out/n, 1), torch.zeros(out, n, dtype=torch.float64)
        for o in range(out):
            centre = (o + .5)*n/out - .5
            taps = [(i, s*cubic(s*(centre - i))) for i in range(int(centre - 2/s) - 2, int(centre + 2/s) + 3)]
            for i, v in taps: m[o, min(max(i, 0), n - 1)] += v/sum(v for _, v in taps)
        return m
    for (h, w), (oh, ow) in [((12, 9), (6, 3)), ((8, 10), (16, 20)), ((12, 12), (4, 6)), ((5, 7), (15, 14)), ((16, 16), (4, 4))]:
        x = torch.randn(2, h, w, dtype=torch.float64)
        assert (bicubic(x, (oh, ow)) - axis(h, oh) @ x @ axis(w, ow).T).abs().max() < 1e-6, (h, w, oh, ow)

# Layouts

def save(path, im): path.parent.mkdir(parents=True, exist_ok=True); im.save(path)

def test_layouts(tmp_path):
    for i in (1, 2): save(tmp_path/'d'/'DIV2K_train_HR'/f'000{i}.png', picture(40, 48)); save(tmp_path/'d'/'DIV2K_train_LR_bicubic'/'X2'/f'000{i}x2.png', picture(20, 24))
    save(tmp_path/'d'/'DIV2K_valid_HR'/'0801.png', picture(40, 48)); save(tmp_path/'d'/'DIV2K_valid_LR_bicubic'/'X2'/'0801x2.png', picture(20, 24))
    save(tmp_path/'pairs'/'img_001_SRF_2_HR.png', picture(40, 48)); save(tmp_path/'pairs'/'img_001_SRF_2_LR.png', picture(20, 24))
    save(tmp_path/'folders'/'HR'/'a.bmp', picture(41, 48)); save(tmp_path/'folders'/'LR'/'a.bmp', picture(20, 24))
    for n in 'a.png', 'b.jpg', 'sub/c.webp', 'sub/d.bmp', 'e.JPEG': save(tmp_path/'any'/n, picture(40, 49))
    assert [n for n, *_ in find_pairs(tmp_path/'d')] == ['0001', '0002'] and find_pairs(tmp_path/'d', 2, 'valid')[0][2].name == '0801x2.png'
    assert find_pairs(tmp_path/'pairs')[0][0] == 'img_001' and [n for n, *_ in find_pairs(tmp_path/'any')] == ['a', 'b', 'e', 'sub/c', 'sub/d']
    assert load_pairs(find_pairs(tmp_path/'folders'))[0].hr.shape == (1, 40, 48) and load_pairs(find_pairs(tmp_path/'any'))[0].hr.shape == (1, 40, 48)
    dls = get_sr_dls(tmp_path/'d', crop=16, bs=2, iterations=3, seed=0)
    assert list(dls.benchmarks) == ['DIV2K'] and [tuple(x.shape) for x, _ in dls.train] == [(2, 1, 8, 8)]*3
    assert {n: len(p) for n, p in load_benchmarks(tmp_path).items() if n != 'd'} == dict(any=5, folders=1, pairs=1)
    for (x, y), p in zip(dls.valid, dls.benchmarks['DIV2K']): assert torch.equal(y[0]*UNIT, p.hr.float())

def test_crops_repeat_and_turn():
    pairs = [make_pair('a', luminance(torch.from_numpy(np.array(picture(64, 80))).permute(2, 0, 1)))]
    c = Crops(pairs, 64, 32)
    x, y = c.batch(range(64), 'key')
    again = c.batch(range(64), 'key')
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, c.batch(range(64), 'other')[0])
    windows = pairs[0].hr.unfold(1, 32, 1).unfold(2, 32, 1)[0].flatten(0, 1)
    seen = set()
    for crop in y[:, 0]:
        for k in range(8):
            t = crop.rot90(k % 4) if k < 4 else crop.T.rot90(k % 4)
            if (windows == t).all(-1).all(-1).any(): seen.add(k)
    assert len(seen) == 8 # all mirrorings and transpositions occur

# Bad folders: named, counted, before training

def test_bad_images_are_named_and_counted(tmp_path):
    save(tmp_path/'good.png', picture(64, 64)); save(tmp_path/'small.png', picture(20, 64)); (tmp_path/'broken.png').write_bytes(b'no picture'); (tmp_path/'notes.txt').write_text('x')
    cut = tmp_path/'cut.png'; save(cut, picture(64, 64)); cut.write_bytes(cut.read_bytes()[:200])
    with pytest.warns(UserWarning) as w: pairs = load_pairs(find_pairs(tmp_path), 2, least=32)
    text = ' '.join(str(o.message) for o in w)
    assert [p.name for p in pairs] == ['good'] and '3 of 4 images' in text
    for word in 'small: 64×20', 'broken.png', 'cut.png', 'notes.txt', 'smaller than the crop of 32': assert word in text, text
    (tmp_path/'good.png').unlink()
    with pytest.raises(ValueError, match='3 of 3'), warnings.catch_warnings(): warnings.simplefilter('ignore'); load_pairs(find_pairs(tmp_path), 2, least=32)

def test_sizes_that_do_not_fit(tmp_path):
    save(tmp_path/'HR'/'a.png', picture(40, 48)); save(tmp_path/'LR'/'a.png', picture(20, 25)); save(tmp_path/'HR'/'b.png', picture(40, 48))
    with pytest.raises(ValueError, match='2 of 2') as e: load_pairs(find_pairs(tmp_path))
    assert '48×40 is not 2 times 25×20' in str(e.value) and 'no partner' in str(e.value)

@pytest.mark.parametrize('call,words', [
    (lambda d: find_pairs(d/'no'), ('no folder',)), (lambda d: find_pairs(d), ('no images', '.png')), (lambda d: get_sr_dls('photos', crop=33), ('crop=33', '2')), (lambda d: get_sr_dls('photos', scale=1), ('scale', '1')),
    (lambda d: get_sr_dls('photos', iterations=0), ('iterations',)), (lambda d: load_benchmarks(d), ('no images',)), (lambda d: open_image(d/'x.png'), ('x.png',)), (lambda d: bicubic(torch.zeros(4, 4), (0, 2)), ('size',)),
    (lambda d: get_recipe('ecbsr_m4c8', 'repq', crop='big'), ('crop', 'big')), (lambda d: get_recipe('resnet18', iterations=5), ('iterations', 'resnet18'))])
def test_one_clear_line(call, words, tmp_path):
    with pytest.raises((ValueError, OSError)) as e: call(tmp_path)
    assert '\n' not in str(e.value)
    for w in words: assert w in str(e.value)

# Measures and whole images

def test_psnr_by_hand():
    y = torch.full((1, 1, 20, 20), 100.); x = y.clone(); x[..., 10, 10] = 104.4; x[..., 0, 0] = 0 # the corner is shaved off
    assert psnr(x, y, 2) == pytest.approx(10*np.log10(255**2/(4.4**2/256))) and psnr(x, y, 2, rounded=True) == pytest.approx(10*np.log10(255**2/(16/256)))
    assert psnr(y + 1000, y, 2) == pytest.approx(10*np.log10(255**2/155**2)) and ssim(y, y) == pytest.approx(1)

@pytest.mark.parametrize('form', ['branched', 'merged', 'quantized', 'deployed'])
def test_tiles_give_the_whole_image(form):
    m, x = create_model('ecbsr_m4c8').double().eval(), torch.rand(1, 1, 37, 53).double()*255
    if form == 'merged': m = merge(m, verbose=False)
    if form in ('quantized', 'deployed'): m = calibrate(quantize(m, 4, 4, verbose=False), [x]).eval()
    if form == 'deployed': m = deploy(m, verbose=False)
    assert reach(m) == 6
    with torch.no_grad(): want = m(x)
    for tile in 1, 8, 20, 64: assert (super_resolve(m, x, tile) - want).abs().max() < 1e-8

def test_upscaling_keeps_what_it_should(tmp_path):
    m = create_model('ecbsr_m4c8', scale=3).eval()
    for p in m.parameters(): nn.init.zeros_(p)
    grey = picture(9, 7, 1)
    assert np.array_equal(np.asarray(upscale(m, grey)), np.asarray(grey).repeat(3, 0).repeat(3, 1))
    assert upscale(m, picture(9, 7, 4)).mode == 'RGBA' and upscale(m, picture(9, 7)).size == (21, 27)
    Image.fromarray((rng.integers(0, 2**16, (8, 8), dtype=np.uint16))).save(tmp_path/'g16.png')
    upscale_file(m, tmp_path/'g16.png', tmp_path/'g16x3.png')
    a, b = (np.asarray(Image.open(tmp_path/n)).astype(int) for n in ('g16.png', 'g16x3.png'))
    assert np.abs(b[1::3, 1::3] - a).max() <= 1
    p = Image.new('P', (6, 6)); p.putpalette([i for c in range(256) for i in (c, 0, 0)]); p.save(tmp_path/'p.png')
    assert open_image(tmp_path/'p.png').mode == 'RGB'
    picture(6, 6).convert('CMYK').save(tmp_path/'c.jpg')
    assert np.array_equal(np.asarray(open_image(tmp_path/'c.jpg')), np.asarray(open_rgb(tmp_path/'c.jpg')))

@pytest.mark.parametrize('code', range(1, 9))
def test_a_turned_camera(tmp_path, code):
    "The picture is upright, in every mode, and stays so when it is upscaled"
    m = create_model('ecbsr_m4c8').eval()
    for p in m.parameters(): nn.init.zeros_(p)
    exif, back = Image.Exif(), {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[code]
    exif[0x112] = code
    grey = Image.fromarray(rng.integers(0, 2**16, (6, 9), dtype=np.uint16))
    for i, im in enumerate((picture(6, 9), picture(6, 9, 1), picture(6, 9, 2), picture(6, 9, 4), picture(6, 9).convert('P', palette=Image.Palette.ADAPTIVE), grey)):
        stored = im if back is None else im.transpose(Image.Transpose(back))
        im.save(tmp_path/f'{i}.png'); stored.save(tmp_path/f'{i}turned.png', exif=exif)
        a, b = (open_image(tmp_path/f'{i}{n}.png') for n in ('', 'turned'))
        assert a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b)), (code, im.mode)
        for n in '', 'turned': upscale_file(m, tmp_path/f'{i}{n}.png', tmp_path/f'{i}{n}x2.png')
        assert (tmp_path/f'{i}x2.png').read_bytes() == (tmp_path/f'{i}turnedx2.png').read_bytes()
    assert torch.equal(*(load_pairs([('', tmp_path/f'0{n}.png', None)])[0].lr for n in ('', 'turned')))

def test_unreadable_images_leave_validation_images(tmp_path):
    "What is held out is chosen among the readable images; where there is none, the error says of what"
    for i in range(11): save(tmp_path/f'a/{i:02d}.png', picture(40, 40))
    before = [p.name for p in get_sr_dls(tmp_path/'a', crop=32, bs=2, iterations=1).benchmarks['held out']]
    for i in 9, 4: (tmp_path/f'a/{i:02d}.png').write_bytes(b'')
    with pytest.warns(UserWarning, match='2 of 11 images cannot be used'): dls = get_sr_dls(tmp_path/'a', crop=32, bs=2, iterations=1)
    assert before == ['09'] and [p.name for p in dls.benchmarks['held out']] == ['10'] and len(dls.train_ds.pairs) == 8
    assert unreadable(dls) == [str(tmp_path/f'a/{i:02d}.png') for i in (4, 9)]
    (tmp_path/'b').mkdir(); (tmp_path/'b/x.png').write_bytes(b'')
    with pytest.raises(ValueError, match='1 of 1 validation images of b cannot be used'): get_sr_dls('photos', crop=32, bs=2, iterations=1, benchmarks=tmp_path/'b')
    save(tmp_path/'b/y.png', picture(24, 24))
    with pytest.warns(UserWarning): row = train(get_recipe('ecbsr_m4c8', 'repq', data=str(tmp_path/'a'), benchmarks=str(tmp_path/'b'), crop=32, batch_size=2, iterations=2, epochs=1), tmp_path/'run', on_epoch=lambda *a: None, timing=0)
    assert row['unreadable_images'] == 3 == len((tmp_path/'run/unreadable.txt').read_text().splitlines())

def test_what_pillow_reads_of_other_files(tmp_path):
    "Of 16-bit colour 8 bits, as in classification; floating point not at all"
    import struct, zlib
    chunk = lambda k, d: struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d))
    (tmp_path/'rgb16.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 2, 1, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0' + bytes(12))) + chunk(b'IEND', b''))
    assert np.array_equal(np.asarray(open_image(tmp_path/'rgb16.png')), np.asarray(open_rgb(tmp_path/'rgb16.png')))
    with pytest.warns(UserWarning, match='16 bits per colour channel, of which 8 are kept'): upscale_file(create_model('ecbsr_m4c8').eval(), tmp_path/'rgb16.png', tmp_path/'x2.png')
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path/'f.tif')
    with pytest.raises(ValueError, match='f.tif has floating-point pixels'): open_image(tmp_path/'f.tif')

def test_sixteen_bits_count_in_pairs(tmp_path):
    "The small image of a 16-bit photograph was white where the large one is not black"
    grey = picture(24, 24, 1)
    grey.save(tmp_path/'8.png'); Image.fromarray(np.asarray(grey).astype(np.uint16)*257).save(tmp_path/'16.png')
    a, b = (load_pairs([('', tmp_path/f'{n}.png', None)])[0] for n in (8, 16))
    assert torch.equal(a.lr, b.lr) and torch.equal(a.hr, b.hr)

def test_what_a_picture_has_beside_pixels(tmp_path):
    "One colour that is transparent, a colour profile; of several pictures the first, said so"
    model = create_model('ecbsr_m4c8').eval()
    for mode, value, res in ('L', 7, 'LA'), ('RGB', (1, 2, 3), 'RGBA'):
        Image.new(mode, (6, 4), value).save(tmp_path/f'{mode}.png', transparency=value)
        assert open_image(tmp_path/f'{mode}.png').mode == res and np.asarray(open_image(tmp_path/f'{mode}.png'))[..., -1].max() == 0
        with pytest.raises(ValueError, match='has transparency, which .jpg cannot hold'): upscale_file(model, tmp_path/f'{mode}.png', tmp_path/'x.jpg')
    Image.fromarray(np.full((4, 6), 7, np.uint16)).save(tmp_path/'16.png', transparency=7)
    with pytest.warns(UserWarning, match='transparent grey level of 16 bits, which is left out'): upscale_file(model, tmp_path/'16.png', tmp_path/'16x2.png')
    for name in 'a.png', 'a.webp':
        picture(4, 6).save(tmp_path/name, save_all=True, append_images=[picture(4, 6)])
        with pytest.warns(UserWarning, match=f'{name} has 2 pictures, of which the first is taken'): open_image(tmp_path/name)
    picture(4, 6).save(tmp_path/'profile.png', icc_profile=b'of a camera')
    for ending in 'png', 'jpg', 'webp':
        upscale_file(model, tmp_path/'profile.png', tmp_path/f'profile.{ending}x.{ending}')
        assert Image.open(tmp_path/f'profile.{ending}x.{ending}').info['icc_profile'] == b'of a camera'
    picture(4, 6).convert('CMYK').save(tmp_path/'cmyk.jpg', icc_profile=b'of a press')
    upscale_file(model, tmp_path/'cmyk.jpg', tmp_path/'cmyk.png')
    assert 'icc_profile' not in Image.open(tmp_path/'cmyk.png').info
    Image.fromarray(np.full((4, 6), 2**20, np.int32)).save(tmp_path/'32.tif')
    with pytest.raises(ValueError, match='32.tif has whole numbers beyond 16 bits'): open_image(tmp_path/'32.tif')

# In colour

SMALL = dict(crop=32, batch_size=2, iterations=2, epochs=1)
def quiet(*a): pass

@pytest.fixture
def photos(tmp_path):
    "Ten colour photographs, one of them grey"
    for i in range(10): save(tmp_path/f'photos/{i}.png', picture(40, 44) if i else picture(40, 44, 1))
    return tmp_path/'photos'

def test_rgb_floor_is_nearly_that_of_luminance(matlab):
    "Bicubic in RGB, measured on Y, and bicubic of Y: what differs is clamping"
    y, rgb = (evaluate_pairs(None, load_pairs(find_pairs(matlab/'Set5'), channels=c), with_ssim=True) for c in (1, 3))
    assert abs(y['psnr'] - rgb['psnr']) < .05 and abs(y['ssim'] - rgb['ssim']) < 1e-3 and y['psnr'] != rgb['psnr']

def test_pairs_in_colour(photos):
    "Colours as they are, and the luminance of a pair is the pair of the luminance"
    found = find_pairs(photos)
    for p, q in zip(load_pairs(found, channels=3), load_pairs(found)):
        assert p.hr.shape == (3, *q.hr.shape[1:]) and p.lr.shape == (3, *q.lr.shape[1:]) and is_grey(p.hr) == (p.name == '0')
        for a, b in (p.lr, q.lr), (p.hr, q.hr): assert (rgb_to_ycbcr(a.float()/UNIT)[:1] - b.float()/UNIT).abs().max() < .02
    assert torch.equal(p.hr.float()/UNIT, own_colours(open_image(photos/'9.png')))

def test_psnr_of_rgb_by_hand():
    "The field's: the output clamped (and rounded, as a file is), its Y against the Y of the truth"
    x, y = torch.rand(3, 20, 24)*300 - 20, torch.rand(3, 20, 24)*255
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)/255
    for rounded in False, True:
        def inner(t): return ((t.round() if rounded else t).double()*weights[:, None, None]).sum(0)[2:-2, 2:-2]
        want = 10*np.log10(255**2/(inner(x.clamp(0, 255)) - inner(y)).square().mean().item())
        assert psnr(x, y, 2, rounded) == pytest.approx(want) and psnr(x[None], y[None], 2, rounded) == pytest.approx(want)
    assert psnr(y.flip(0), y) < 30 and ssim(y, y) == pytest.approx(1)

@pytest.mark.parametrize('form', ['branched', 'quantized', 'deployed'])
def test_a_colour_network_enlarges_every_picture(form, tmp_path):
    "Colour in colour, grey in grey, 16 bits in 16 bits; with nothing learned, the pixels themselves"
    m = create_model('ecbsr_m4c8_rgb', scale=3).eval()
    for p in m.parameters(): nn.init.zeros_(p)
    if form != 'branched': m = calibrate(quantize(m, 8, 8, verbose=False), [torch.rand(1, 3, 9, 9)*255]).eval()
    if form == 'deployed': m = deploy(m, verbose=False)
    for im in picture(9, 7), picture(9, 7, 1), picture(9, 7, 4), picture(9, 7, 2):
        big = upscale(m, im, tile=4)
        assert big.mode == im.mode and big.size == (21, 27)
        colours = slice(0, {'LA': 1, 'RGBA': 3}.get(im.mode, 3))
        a, b = (np.asarray(i).reshape(*i.size[::-1], -1)[..., colours].astype(int) for i in (im, big))
        assert np.abs(b - a.repeat(3, 0).repeat(3, 1)).max() <= (0 if im.mode[0] == 'R' else 1), im.mode
    Image.fromarray(rng.integers(0, 2**16, (8, 8), dtype=np.uint16)).save(tmp_path/'16.png')
    upscale_file(m, tmp_path/'16.png', tmp_path/'16x3.png')
    a, b = (np.asarray(Image.open(tmp_path/n)).astype(int) for n in ('16.png', '16x3.png'))
    assert np.abs(b[1::3, 1::3] - a).max() <= 1

@pytest.mark.filterwarnings('ignore:invalid value', 'ignore::FutureWarning')
def test_colour_from_training_to_a_file(photos, tmp_path):
    "Trained, quantized with and without training, evaluated, exported and used, as a network for the luminance is"
    bench = tmp_path/'bench'/'Set2'
    for i in (0, 1): save(bench/f'{i}.png', picture(48, 40) if i else picture(48, 40, 1))
    own = dict(data=str(photos), benchmarks=str(bench.parent), **SMALL)
    fp = train(get_recipe('ecbsr_m4c8_rgb', 'repq', **own), tmp_path/'fp', on_epoch=quiet, timing=1)
    w2 = train(get_recipe('ecbsr_m4c8_rgb', 'repq', 2, **own, centred=True), tmp_path/'w2', tmp_path/'fp', on_epoch=quiet, timing=0, teacher=tmp_path/'fp')
    ptq = post_training(tmp_path/'fp', tmp_path/'ptq', 8, batches=1)
    assert fp['step_ratio'] and fp['model'] == 'ecbsr_m4c8_rgb' and all(list(r['psnr']) == ['Set2'] for r in (fp, w2, ptq))
    again = eval_run(tmp_path/'w2')
    assert again['psnr'] == pytest.approx(w2['psnr']) and again['images'] == 2 and eval_run(tmp_path/'w2', bench.parent)['psnr'] == pytest.approx(w2['psnr'])
    assert again['merged_psnr']['Set2'] == pytest.approx(again['psnr']['Set2'], abs=.01)
    text = export_run(tmp_path/'w2')
    assert 'ONNX Runtime equals the integer reference' in text and load_run(tmp_path/'w2')[2]['in_channels'] == 3
    dls = get_sr_dls(photos, crop=32, bs=2, iterations=1, benchmarks=bench, channels=3)
    assert dls.grey == 1 and dls.in_channels == 3 and dls.one_batch()[0].shape == (2, 3, 16, 16)
    save_details({'2 bits': load_run(tmp_path/'w2')[1].eval()}, dls, tmp_path)
    a = np.asarray(Image.open(tmp_path/'1.png').convert('RGB')).astype(int)
    assert np.abs(a[..., 0] - a[..., 2]).max() > 50 # a picture in colour

@pytest.mark.parametrize('call, words', [
    (lambda d: get_sr_dls(d/'grey', crop=32, bs=2, iterations=1, channels=3), 'all 2 training images of .* are grey.*ecbsr_m4c8'),
    (lambda d: get_sr_dls(d/'mixed', crop=16, bs=2, iterations=1, channels=3), 'is in colour and its small image .*LR/a.png is grey'),
    (lambda d: get_sr_dls('photos', channels=4), 'channels must be 1, the luminance, or 3, RGB, got 4'),
    (lambda d: create_model('plainsr_m4c8_rgb', in_channels=1), 'plainsr_m4c8_rgb takes images of 3 channels, RGB, not of 1'),
    (lambda d: train(get_recipe('ecbsr_m4c8_rgb', 'repq', 4, data=str(d/'mixed'), **SMALL), d/'x', d/'y', on_epoch=quiet), 'y is ecbsr_m4c8.* needs ecbsr_m4c8_rgb')])
def test_what_is_wrong_with_colours(call, words, tmp_path):
    for i in range(3): save(tmp_path/f'grey/{i}.png', picture(40, 44, 1))
    save(tmp_path/'mixed/HR/a.png', picture(40, 48)); save(tmp_path/'mixed/LR/a.png', picture(20, 24, 1))
    save(tmp_path/'c/a.png', picture(40, 44)); save(tmp_path/'c/b.png', picture(40, 44))
    if 'needs' in words: train(get_recipe('ecbsr_m4c8', 'repq', data=str(tmp_path/'c'), **SMALL), tmp_path/'y', on_epoch=quiet, timing=0)
    with pytest.raises(ValueError, match=words) as e: call(tmp_path)
    assert '\n' not in str(e.value) and not (tmp_path/'x').exists()

def test_colour_checkpoints_are_known():
    for scale in 2, 3:
        back, origin = from_official(to_official(create_model('ecbsr_m4c8_rgb', scale=scale)))
        assert (origin.model, origin.scale, origin.in_channels) == ('ecbsr_m4c8_rgb', scale, 3)
    assert from_official(to_official(create_model('ecbsr_m4c8')))[1].model == 'ecbsr_m4c8'
