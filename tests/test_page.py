"The page that runs, in a real browser: drawn, clicked, touched and typed on; what it answers is what the integer network computes."
import json, sys
import numpy as np, pytest, torch
from PIL import Image
from conftest import ROOT
sys.path.insert(0, str(ROOT/'scripts'))
import page as page_files
from browser import browser, find_browser
from repq.deploy.export import onnx_session, run_onnx

NETS = {(r['kind'], r['bits']): r for r in page_files.networks()}
BITS = 8, 4, 2

# without a browser

def test_networks_are_small():
    assert set(NETS) == {(k, b) for k in ('digits', 'photos') for b in BITS}
    for r in NETS.values():
        assert r['bytes'] == (page_files.NETWORKS/r['file']).stat().st_size < 100_000
    for kind in 'digits', 'photos': assert NETS[kind, 8]['bytes'] > NETS[kind, 4]['bytes'] > NETS[kind, 2]['bytes']

@pytest.mark.parametrize('bits', BITS)
def test_accuracy_is_the_one_that_is_said(bits):
    r = NETS['digits', bits]
    x, y = page_files.digit_images(r['stats'])
    assert (r['net'](x).argmax(1) == y).float().mean().item() == r['accuracy'] > .8 and len(y) == r['images']

@pytest.mark.parametrize('kind, bits', NETS)
def test_files_compute_the_reference(kind, bits, tmp_path):
    net = NETS[kind, bits]['net']
    x = page_files.digit_images(NETS['digits', bits]['stats'])[0] if kind == 'digits' else page_files.photo_input()[..., :64, :80]
    (tmp_path/'net.onnx').write_bytes(page_files.onnx_file(net, kind))
    assert torch.equal(run_onnx(onnx_session(tmp_path/'net.onnx', exact=False), x), net(x))

def test_levels_are_what_batches_have():
    levels = torch.tensor(page_files.levels(NETS['digits', 8]['stats']))
    x = page_files.digit_images(NETS['digits', 8]['stats'])[0]
    assert torch.equal(x.unique(), levels.sort().values)

def test_without_the_runtime_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(page_files, 'runtime_folder', lambda: None)
    assert not page_files.build(tmp_path)
    assert 'null' in (tmp_path/'runtime.js').read_text()

# with one

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    if not find_browser(): pytest.skip('no Chromium: set REPQ_BROWSER')
    if not page_files.runtime_folder(): pytest.skip('no onnxruntime-web: make runtime, or set REPQ_ORT_WEB')
    out = tmp_path_factory.mktemp('page')
    assert page_files.build(out)
    return out

@pytest.fixture(scope='module')
def chromium(site):
    with browser() as tab: yield tab

@pytest.fixture
def tab(chromium, site):
    "The page, opened from its file"
    chromium.size(1000, 900)
    chromium.open((site/'index.html').as_uri())
    chromium.wait("document.querySelectorAll('.pick button').length == 10")
    yield chromium
    assert not chromium.errors
    chromium.errors.clear()

def answers(tab):
    "What stands on the page, by bits, and the pixels that it was computed from; each is compared with the integer network"
    tab.wait("document.querySelector('tbody').dataset.greys")
    greys = json.loads(tab.js("document.querySelector('tbody').dataset.greys"))
    rows = {int(b): (json.loads(scores), cells) for b, scores, cells in tab.js("[...document.querySelectorAll('tbody tr')].map(r => [r.dataset.bits, r.dataset.scores, [...r.cells].map(c => c.innerText)])")}
    assert set(rows) == set(BITS) and len(greys) == 64 and set(greys) <= set(range(17))
    for bits, (scores, cells) in rows.items():
        r = NETS['digits', bits]
        x = torch.tensor(page_files.levels(r['stats']))[torch.tensor(greys)].view(1, 1, 8, 8)
        assert torch.equal(torch.tensor(scores), r['net'](x)[0]), bits
        assert cells[1] == str(int(np.argmax(scores))) and cells[3] == f"{r['bytes']:,} B" and cells[2].endswith(' ms')
        assert cells[4] == f"{len(page_files.onnx_file(r['net'], 'digits')):,} B"
    return {b: int(cells[1]) for b, (_, cells) in rows.items()}, greys

DRAWN = {0: [[(.5, .1), (.3, .25), (.25, .5), (.3, .75), (.5, .9), (.7, .75), (.75, .5), (.7, .25), (.5, .1)]],
         1: [[(.4, .25), (.55, .1), (.55, .9)]],
         4: [[(.35, .1), (.27, .52), (.75, .52)], [(.65, .3), (.62, .9)]],
         7: [[(.27, .12), (.74, .12), (.45, .9)], [(.35, .5), (.68, .5)]]}

def strokes(tab, digit):
    "Points on the screen, stroke by stroke"
    x, y, w, h = tab.place('.pad')
    for ends in DRAWN[digit]:
        ends = [(x + w*a, y + h*b) for a, b in ends]
        yield [tuple(np.add(a, np.subtract(b, a)*t)) for a, b in zip(ends, ends[1:]) for t in np.linspace(0, 1, 6)]

@pytest.mark.parametrize('digit', DRAWN)
def test_drawn_with_the_mouse(tab, digit):
    for first, *rest in strokes(tab, digit):
        tab.mouse('Pressed', *first)
        for p in rest: tab.mouse('Moved', *p)
        tab.mouse('Released', *rest[-1])
    tab.wait("document.querySelector('.digits-status').innerText == '' && document.querySelector('tbody').dataset.greys")
    got, greys = answers(tab)
    assert got[8] == digit and max(greys) == 16

def test_digits_to_pick(tab):
    right = 0
    for n in range(10):
        tab.click(f'.pick [data-digit="{n}"]')
        got, greys = answers(tab)
        assert greys == page_files.examples()[n]
        right += got[8] == n
    assert right >= 9
    tab.click('.clear')
    assert tab.js("document.querySelectorAll('tbody tr').length") == 0

def test_keyboard(tab):
    tab.js("document.querySelector('.pad').focus()")
    for _ in range(8): tab.key('ArrowUp')
    tab.key(' ', ' ')
    for _ in range(16): tab.key('ArrowDown')
    tab.key(' ', ' ')
    assert answers(tab)[0][8] == 1
    tab.key('Delete')
    assert tab.js("document.querySelectorAll('tbody tr').length") == 0
    order = []     # everything can be reached
    for _ in range(18):
        tab.key('Tab')
        order.append(tab.js("document.activeElement.className || document.activeElement.name"))
    assert {'clear', 'digit', 'photo', 'sample', 'bits'} <= set(order)

def test_phone(tab):
    tab.size(390, 800, phone=True)
    for first, *rest in strokes(tab, 0):
        tab.touch('Start', first)
        for p in rest: tab.touch('Move', p)
        tab.touch('End')
    assert answers(tab)[0][8] == 0
    assert tab.js('document.documentElement.scrollWidth') <= 390
    small = tab.js("[...document.querySelectorAll('button')].filter(b => b.getBoundingClientRect().height < 40).length")
    assert not small

def last(tab, bits):
    tab.wait(f"window.repqLast?.bits == {bits}")
    d = tab.js("({...repqLast, x: Array.from(repqLast.x), y: Array.from(repqLast.y)})")
    h, w = d['height'], d['width']
    x, y = torch.tensor(d['x']).view(1, 1, h, w), torch.tensor(d['y']).view(1, 1, 2*h, 2*w)
    assert torch.equal(NETS['photos', bits]['net'](x), y)
    return x, y

def test_picture_of_the_visitor(tab, tmp_path):
    from repq.training.pairs import luminance
    rgb = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(rgb).save(tmp_path/'own.png')
    tab.choose('.photo', tmp_path/'own.png')
    x, y = last(tab, 8)
    assert torch.allclose(x[0], luminance(torch.from_numpy(rgb).permute(2, 0, 1)), atol=1e-3)
    assert tab.js("['.smooth', '.sharp'].map(s => [document.querySelector(s).width, document.querySelector(s).height])") == [[96, 72]]*2
    for bits in 4, 2:
        tab.click(f'input[value="{bits}"]')
        last(tab, bits)
    said = tab.wait("document.querySelector('.photo-status').innerText.match(/.* ms/)?.[0]")
    assert '48 × 36 to 96 × 72' in said and f"{NETS['photos', 2]['bytes']:,} B" in said

def test_sample_and_large_pictures(tab, tmp_path):
    tab.click('.sample')
    x, y = last(tab, 8)
    assert x.shape[-2:] == (128, 128)
    tab.js('repqLast = null')
    Image.new('RGB', (1200, 600), 'navy').save(tmp_path/'large.jpg')
    tab.choose('.photo', tmp_path/'large.jpg')
    assert last(tab, 8)[0].shape[-2:] == (128, 256)

def test_no_picture(tab, tmp_path):
    (tmp_path/'no.png').write_text('no picture')
    tab.choose('.photo', tmp_path/'no.png')
    tab.wait("document.querySelector('.photo-status').innerText.includes('no picture')")

def test_without_runtime_in_the_browser(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(page_files, 'runtime_folder', lambda: None)
    page_files.build(tmp_path)
    chromium.open((tmp_path/'index.html').as_uri())
    chromium.wait("document.querySelectorAll('.pick button').length == 10")
    chromium.click('.pick [data-digit="3"]')
    chromium.wait("document.querySelector('.digits-status').innerText.includes('without onnxruntime-web')")
