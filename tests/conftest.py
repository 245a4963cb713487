"What all tests share: one thread, a fixed seed, and the reference data where it is there."
import os, random, shutil, tarfile
from pathlib import Path
import numpy as np, pytest, torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault('REPQ_PROGRESS', '0') # what commands tell after two seconds depends on the machine
torch.set_num_threads(1)   # two test processes share the cores

@pytest.fixture(autouse=True)
def seeded():
    "Each test starts from the same random state, whichever ran before it."
    random.seed(0); np.random.seed(0); torch.manual_seed(0)

@pytest.fixture(scope='session')
def shared():
    "The folder of reference vectors and data: REPQ_SHARED, or ../shared beside the repository."
    path = Path(os.environ.get('REPQ_SHARED') or ROOT.parent/'shared')
    if not path.is_dir(): pytest.skip(f'no reference data at {path}: set REPQ_SHARED')
    return path

@pytest.fixture
def imagenet_sample(shared, tmp_path):
    "24 images of ImageNet as an ImageFolder tree, train/ the same as val/."
    tar = shared/'data/imagenet_sample.tar'
    if not tar.exists(): pytest.skip(f'no {tar}')
    with tarfile.open(tar) as t:
        for m, _ in zip(t, range(24)): t.extract(m, tmp_path, filter='data')
    root = tmp_path/'imagenet_sample'
    shutil.copytree(root/'val', root/'train') # a link would be the same images, which is refused
    return root
