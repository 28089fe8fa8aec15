"The fast cells of the chapters on a GPU."

import re

import pytest
from notebooks import NOTEBOOKS, directives

# Their fast cells compute on the CPU, by name, so that what they print is the same everywhere; in
# minutes they would show here what they show there. The functions are called by the tests beside
ON_THE_CPU = '00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16 24 26 29 30 32 33 35'.split()

TOO_SLOW = '19 27'.split()  # minutes here; evaluations and the command line have tests beside
LEFT_OUT = [path for path in NOTEBOOKS if path.stem[:2] in ON_THE_CPU]
RUN = [path for path in NOTEBOOKS if path.stem[:2] not in ON_THE_CPU + TOO_SLOW]


def fast_cells(path):
    from execnb.nbio import read_nb

    code = [cell for cell in read_nb(path).cells if cell.cell_type == 'code']
    return [cell for cell in code if not directives(cell) & {'slow', 'notest', 'eval:'}]


@pytest.mark.parametrize('path', RUN, ids=lambda path: path.stem)
def test_fast_cells(path, monkeypatch):
    from execnb.shell import CaptureShell

    monkeypatch.chdir(path.parent)
    shell = CaptureShell(path)
    for cell in fast_cells(path):
        shell.cell(cell)
        assert not shell.exc, f'{cell.id}: {shell.prettytb(path)}'


@pytest.mark.parametrize('path', LEFT_OUT, ids=lambda path: path.stem)
def test_chapters_that_are_left_out_name_the_cpu(path):
    shown = [cell.source for cell in fast_cells(path) if 'export' not in directives(cell)]
    named = r'(?:load_pretrained|pick_device)\(.*|^fit\((?:.*\)$|[^)]*^\))'
    calls = re.findall(named, '\n'.join(shown), re.M)
    calls = [call for call in calls if 'pick_device()}, {torch' not in call]  # what was run on
    assert all('cpu' in call for call in calls), calls
