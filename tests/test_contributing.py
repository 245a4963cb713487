"What CONTRIBUTING.md shows is run as it stands, in order, in a process of its own."
import re, subprocess, sys
from pathlib import Path

TEXT = (Path(__file__).resolve().parent.parent/'CONTRIBUTING.md').read_text(encoding='utf-8')

def test_its_code_runs(tmp_path):
    code = re.findall(r'^```python\n(.*?)^```', TEXT, flags=re.M|re.S)
    assert len(code) >= 5
    (tmp_path/'code.py').write_text('\n'.join(code), encoding='utf-8')
    res = subprocess.run([sys.executable, '-W', 'ignore', 'code.py'], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert res.returncode == 0, res.stderr
