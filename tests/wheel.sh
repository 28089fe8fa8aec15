#!/usr/bin/env bash
# See that sdist and wheel hold the whole package; install the wheel into an empty environment, and there run the README's example and attack a pretrained model.
set -euo pipefail
wheel=$(realpath dist/*.whl) readme=$(realpath README.md)
python3 - "$wheel" dist/*.tar.gz <<'PYTHON'
import subprocess, sys, tarfile, zipfile
package = set(subprocess.check_output(['git', 'ls-files', 'genrobust'], text=True).split())
archive = zipfile.ZipFile(sys.argv[1])
wheel = set(archive.namelist())
sdist = {name.partition('/')[2] for name in tarfile.open(sys.argv[2]).getnames()}
missing = (package - wheel) | (package | {'settings.ini', 'setup.py', 'README.md', 'LICENSE'}) - sdist
about = archive.read(next(name for name in wheel if name.endswith('/METADATA'))).decode()
assert '](nbs/' not in about and '](results/' not in about, 'PyPI has no such files'
assert package and not missing, f'missing from the wheel or the sdist: {sorted(missing)}'
PYTHON
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
if command -v uv > /dev/null; then uv venv -q env && uv pip install -q -p env "$wheel"
else python3 -m venv env && env/bin/pip install -q --no-compile "$wheel"; fi
awk '/^```python$/ {inside=1; next} /^```$/ {if (inside) exit} inside' "$readme" > example.py
test -s example.py
env/bin/python example.py
env/bin/python - <<'PYTHON'
from genrobust.attacks import deepfool
from genrobust.data import synthetic
from genrobust.models import load_pretrained
result = deepfool(load_pretrained('gfz'), synthetic(2).x)
assert result.success.all(), result
print('from the wheel:', result)
PYTHON
env/bin/genrobust --help > /dev/null
