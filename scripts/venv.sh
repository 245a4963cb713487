#!/bin/sh
# Make .venv, or bring it up to date with settings.ini; with one that is up to date, say nothing and return at once.
# The stamp is written last and holds what the install depended on: a moved folder, another Python, an edited settings.ini
# or an interrupted install all show as a stamp that is missing or different.
set -eu
cd -P "$(dirname "$0")/.."
venv=.venv
stamp=$venv/.stamp

state() { pwd; "$venv/bin/python" -c 'import sys; print(sys.version)' && cat settings.ini setup.py pyproject.toml | cksum; }
new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (3,$2))" >/dev/null 2>&1; }
usable() {  # it runs, and it was made here: the scripts in a folder that was moved or copied still point to the old place
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 && new_enough "$venv/bin/python" 10 && grep -qF "$(pwd)/$venv" "$venv/bin/activate"
}
works() { "$venv/bin/python" -m pip check && "$venv/bin/python" -W ignore -c 'import torchvision, fastai.vision.all, nbdev.test, sympy, hypothesis, pytest, xdist, typer, repq'; }

find_python() {  # the first that runs: 3.11 or newer before 3.10, which the stand-in for Quarto does not support
    names="${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}"
    for minor in 11 10; do for p in $names; do if new_enough "$p" $minor; then echo "$p"; return; fi; done; done
    echo "repq: no Python 3.10 or newer found (tried: $names). Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1
}

create() {
    python=$(find_python) || exit 1
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || {
        echo "repq: $python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
    "$python" -m venv "$venv" || exit 1
}

install() {
    quiet=-q; [ -t 1 ] && quiet=
    echo "repq: installing into $venv ($("$venv/bin/python" -V)); from nothing about 3 minutes and 6 GB, PyTorch with CUDA mostly"
    "$venv/bin/python" -m pip install $quiet --no-input --disable-pip-version-check -e '.[dev]'
}

if [ -f "$stamp" ] && [ "$(state 2>/dev/null)" = "$(cat "$stamp")" ]; then exit 0; fi

rm -f "$stamp"
if ! { usable && install && works; }; then
    # keep what is there until its successor works: without a network an old environment is better than none
    if [ -e "$venv" ]; then echo "repq: $venv is incomplete or broken; making it anew"; rm -rf "$venv.old"; mv "$venv" "$venv.old"; fi
    if ! { (create) && install && works; }; then
        rm -rf "$venv"
        if [ -e "$venv.old" ]; then mv "$venv.old" "$venv"; fi
        echo "repq: $venv could not be made; the reason stands above" >&2; exit 1
    fi
fi
rm -rf "$venv.old"
state > "$stamp"
