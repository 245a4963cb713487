"""The page of the site that runs: networks of our own runs, computed in integers by the visitor's browser.
`page.py train` trains them (some minutes) into runs/page and writes page/networks/; `page.py build FOLDER` writes all that the page needs."""
import argparse, base64, gzip, io, json, os, shutil, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, NETWORKS = ROOT/'page', ROOT/'page'/'networks'
BITS = 8, 4, 2
DIGITS = dict(model='repvgg_a0_tiny', data='digits', bits=BITS, methods=('repq-bn',))

def run_names(kind):
    "Folder of each run, by its bits"
    return {b: f'{dict(digits="repq-bn", photos="repq")[kind]}-w{b}' for b in BITS}

# training

def digit_images(stats=None):
    "The validation images as the networks take them, (n, 1, 8, 8), and their labels"
    from repq.training.data import get_dls
    dls = get_dls('digits', bs=8, valid_bs=512, augment=False, seed=0, normalize=stats or True)
    return dls.valid.one_batch()

def photo_input():
    "A validation photograph's luminance, (1, 1, h, w), halved"
    from repq.training.pairs import embedded_photos, load_pairs
    return load_pairs(embedded_photos()[-2:-1])[0].lr[None].float()/128

def recipes(kind, quick=False):
    "Run name -> (recipe, name of the run that it starts from): those of the demo; pictures need one epoch after full precision"
    from dataclasses import replace
    from repq.training.demo import SR_DEMO, demo_recipes
    if kind == 'digits': return demo_recipes(quick=quick, **DIGITS)
    found = demo_recipes(quick=quick, **SR_DEMO)
    return {n: (replace(r, epochs=1) if init or quick else r, init) for n, (r, init) in found.items()}

def train_one(job, tell):
    from repq.training.studies import train_job
    return train_job(*job, tell)

def train(out, quick=False, jobs=None):
    "Train the runs into the folder `out`, so many at a time; finished ones are kept"
    from repq.training.processes import side_by_side, workers_for
    from repq.training.studies import Job
    for kind in 'digits', 'photos':
        todo = recipes(kind, quick)
        def tell(name, share, row):
            if row: print(f'{kind}/{name}: done', flush=True)
        side_by_side(train_one, {n: (Path(out)/kind, Job(n, r, init)) for n, (r, init) in todo.items()}, {n: init for n, (_, init) in todo.items()},
                     workers_for(len(todo)) if jobs is None else jobs, None, tell)

def save_networks(out, folder=NETWORKS):
    "The integer networks of the runs in `out`, and what is said of them"
    from repq.deploy.integer_files import save_integers
    from repq.deploy.integers import to_integer
    from repq.training.run_folders import load_run, read_rows
    rows, folder = [], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in 'digits', 'photos':
        for bits, name in run_names(kind).items():
            recipe, model, info = load_run(Path(out)/kind/name)
            row = read_rows(Path(out)/kind/name/'results.json')[0]
            x, y = digit_images(info['stats']) if kind == 'digits' else (photo_input(), None)
            file = folder/f'{kind}-{bits}.safetensors'
            net = to_integer(model, x)
            save_integers(net, file)
            own = dict(file=file.name, kind=kind, bits=bits, model=recipe.model, method=recipe.method, epochs=recipe.epochs, bytes=file.stat().st_size)
            if kind == 'digits': own |= dict(stats=info['stats'], accuracy=(net(x).argmax(1) == y).float().mean().item(), images=len(y))
            else: own |= dict(psnr=row['psnr'], bicubic_psnr=row['bicubic_psnr'])
            rows.append(own)
    (folder/'networks.json').write_text(json.dumps(rows, indent=1) + '\n')
    return rows

# what the page needs

def networks(folder=NETWORKS):
    "The rows of networks.json, each with its integer network"
    from repq.deploy.integer_files import load_integers
    return [row | dict(net=load_integers(Path(folder)/row['file'])) for row in json.loads((Path(folder)/'networks.json').read_text())]

def levels(stats):
    "What a network takes for each grey level 0..16 of the digits, as their batches have it"
    from repq.training.loader import embedded_digits
    x, grey = digit_images(stats)[0], embedded_digits()[1].x
    res = {int(g): float(x[grey == g][0]) for g in grey.unique()}
    return [res[round(v*255/16)] for v in range(17)]

def examples():
    "A validation digit of each class: its 64 grey levels of 0..16"
    from repq.training.loader import embedded_digits
    digits = embedded_digits()[1]
    return [(digits.x[digits.y == c][3, 0]/255*16).round().int().flatten().tolist() for c in range(10)]

def example_photo(size=128):
    "A part of a validation photograph, halved, as PNG"
    from PIL import Image
    from repq.training.pairs import embedded_photos
    im = Image.open(embedded_photos()[-2][1]).convert('RGB')
    im = im.crop((110, 20, 110 + 2*size, 20 + 2*size)).resize((size, size), Image.BICUBIC)
    im.save(out := io.BytesIO(), 'PNG')
    return out.getvalue()

def text(data): return base64.b64encode(data).decode()

def onnx_file(net, kind):
    "The ONNX file of an integer network, as the page runs it"
    import torch
    from repq.deploy.onnx_writer import onnx_model
    x = torch.zeros(1, 1, 8, 8) if kind == 'digits' else torch.zeros(1, 1, 16, 16)
    return onnx_model(net, x, 'integers').SerializeToString()

def write_networks(out, folder=NETWORKS):
    "networks.js: the ONNX files, what is said of them, and examples"
    rows = []
    for row in networks(folder):
        data = onnx_file(row.pop('net'), row['kind'])
        rows.append(row | dict(onnx_bytes=len(data), onnx=text(data)))
    value = dict(networks=rows, levels=levels(next(r['stats'] for r in rows if r['kind'] == 'digits')), examples=examples(), photo='data:image/png;base64,' + text(example_photo()))
    (Path(out)/'networks.js').write_text('window.REPQ_NETWORKS = ' + json.dumps(value) + '\n')

def runtime_folder():
    "onnxruntime-web's files: REPQ_ORT_WEB/onnxruntime-web/dist, or node_modules here; None where it is not installed"
    dist = Path(os.environ.get('REPQ_ORT_WEB') or ROOT/'node_modules')/'onnxruntime-web'/'dist'
    return dist if (dist/'ort.wasm.min.js').exists() else None

def write_runtime(out):
    "ort.js and runtime.js (its WebAssembly, compressed, as text: a page opened from a file may fetch nothing); says whether they could be had"
    dist, out = runtime_folder(), Path(out)
    if dist is None:
        (out/'ort.js').write_text('')
        (out/'runtime.js').write_text('window.REPQ_RUNTIME = null // onnxruntime-web was not installed when the site was built: make runtime\n')
        return False
    shutil.copyfile(dist/'ort.wasm.min.js', out/'ort.js')
    parts = {k: text(gzip.compress((dist/f'ort-wasm-simd-threaded.{k}').read_bytes(), 9, mtime=0)) for k in ('mjs', 'wasm')}
    (out/'runtime.js').write_text('window.REPQ_RUNTIME = ' + json.dumps(parts) + '\n')
    return True

def build(out, folder=NETWORKS):
    "All files of the page, into the folder `out`; says whether the runtime is among them"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for p in PAGE.iterdir():
        if p.is_file(): shutil.copyfile(p, out/p.name)
    write_networks(out, folder)
    return write_runtime(out)

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest='verb', required=True)
    t = verbs.add_parser('train')
    t.add_argument('--out', default=ROOT/'runs'/'page', type=Path)
    t.add_argument('--quick', action='store_true', help='one epoch a run: to see that everything works')
    t.add_argument('--jobs', type=int, help='runs at a time: one for each core if left out; 0: one after another')
    t.add_argument('--networks', default=NETWORKS, type=Path, help='where the integer networks go')
    b = verbs.add_parser('build')
    b.add_argument('out', type=Path)
    args = parser.parse_args(argv)
    if args.verb == 'build': print(f"{args.out}: the page{'' if build(args.out) else ', without the runtime (make runtime)'}")
    else:
        train(args.out, args.quick, args.jobs)
        for r in save_networks(args.out, args.networks): print(r['file'], f"{r['bytes']:,} bytes", f"{r['accuracy']:.2%}" if 'accuracy' in r else r['psnr'])

if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
