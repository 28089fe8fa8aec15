"The fast cells of all chapters on a GPU."

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'tests'))

from notebooks import directives  # noqa: E402

# Chapters that stay out, and why
LEFT_OUT = {}


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_fast_cells(path, monkeypatch):
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell

    if path.stem in LEFT_OUT:
        pytest.skip(LEFT_OUT[path.stem])
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(os, 'environ', os.environ | dict(MPLBACKEND='agg'))
    shell = CaptureShell(path)
    for cell in read_nb(path).cells:
        words = directives(cell) if cell.cell_type == 'code' else {'slow'}
        if not words & {'slow', 'notest', 'eval:'}:
            shell.cell(cell)
            assert not shell.exc, f'{cell.id}: {shell.prettytb(path)}'
