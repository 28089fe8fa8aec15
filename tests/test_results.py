"The study: what it knows a model by, what it does with damaged files, and what its tables can hold."
import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import mistune
import pandas as pd
import pytest
import torch

from genrobust import results
from genrobust.attacks import apgd, one_vs_all
from genrobust.data import Images, Splits
from genrobust.models import CNN, load_pretrained, load_tensors, save_model, save_tensors
from genrobust.results import (ATTACKS, STRONG, Preset, clustered, markdown_table, read_study,
                               reproduce, smallest_change, tables, wilson)

TINY = Preset(train=60, valid=40, test=20, attacked=4, seeds=2, draws=1)

class Study:
    "Runs a tiny study, and remembers what was said and which stages were measured"
    def __init__(self, monkeypatch, drawn):
        parts = [Images(*[v[a:b] for v in drawn.test]) for a, b in ((0, 60), (60, 100), (100, 120))]
        measure = results.measure
        def remembered(stage, *args):
            self.measured.append(stage)
            self.said.append('measuring')
            return measure(stage, *args)
        monkeypatch.setattr(results, 'load_or_synthetic', lambda *_: ('fashion_mnist', Splits(*parts)))
        monkeypatch.setattr(results, 'measure', remembered)

    def __call__(self, out, models=('cnn',), attacks=('FGS',), preset=TINY):
        self.measured, self.said = [], []
        return reproduce(preset, out, models, attacks, device='cpu', say=self.said.append)

@pytest.fixture
def study(monkeypatch, drawn):
    return Study(monkeypatch, drawn)

def weights(path, seed):
    path.parent.mkdir(exist_ok=True)
    save_model(CNN(hidden=20, seed=seed), path)
    return path

def models_in(folder):
    return list(dict.fromkeys(read_study('images', folder).model))

def test_a_model_is_known_by_its_weights_however_its_path_is_spelled(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = weights(tmp_path/'m.safetensors', 0)
    study('out', ['m.safetensors'])
    assert len(study.measured)==6
    shutil.copy(path, 'copy.safetensors')
    for spelling in ('./m.safetensors', path, 'copy.safetensors'):
        study('out', [spelling])
        assert not study.measured, spelling
    assert models_in('out')==['copy']
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path/'elsewhere')
    study('../out', ['../m.safetensors', str(path), path])
    assert not study.measured and models_in('../out')==['m']
    weights(path, 1)
    study('../out', [path])
    assert len(study.measured)==6

def test_different_files_have_different_names_in_tables(study, tmp_path):
    paths = [weights(tmp_path/folder/'M.safetensors', n) for n, folder in enumerate('ab')]
    shipped = weights(tmp_path/'cnn.safetensors', 2)
    study(tmp_path/'out', [*paths, shipped, 'cnn', 'CNN'])
    names = models_in(tmp_path/'out')
    assert len(names)==4 and names[-1]=='cnn', names
    for name, prefix in zip(names, ('M', 'M', 'cnn')):
        assert re.fullmatch(f'{prefix}-[0-9a-f]{{8}}', name), name
    assert read_study('images', tmp_path/'out').groupby('model').size().eq(TINY.attacked).all()
    for name in names:
        assert f'| {name.upper()} |' in (tmp_path/'out/tables.md').read_text()

@pytest.mark.parametrize('stem', ['a|b', 'a`b', 'a\\', 'a\\|b', 'a\nb', '007', 'NA', 'nan', '$a$b$', 'a b', 'ä', '-'])
def test_any_name_of_a_file_goes_through_the_tables(study, tmp_path, stem):
    folder = study(tmp_path/'out', [weights(tmp_path/f'{stem}.safetensors', 0)])
    shown = ' '.join(stem.upper().splitlines())
    html = mistune.create_markdown(plugins=['table'])((folder/'tables.md').read_text(encoding='utf-8'))
    found = [re.findall('<td[^>]*>(.*?)</td>', row) for row in re.findall('<tr>(.*?)</tr>', html, re.S)]
    heads = [re.findall('<th[^>]*>', row) for row in re.findall('<tr>(.*?)</tr>', html, re.S)]
    cells = [row for row in found if row]
    assert len(cells)==5 and all(row[0]==shown for row in cells), cells
    assert [len(row) for row in cells]==[len(head) for head in heads if head]
    assert (folder/'examples.png').stat().st_size

def test_a_name_that_is_not_utf_8_is_shown_as_text_that_is():
    seeds = iter(range(2))
    names = results._named(['b\udcff.safetensors', 'b\udcfe.safetensors'], lambda model: CNN(seed=next(seeds)))
    assert len(names)==2 and all(name.encode() for name in names)

def test_what_a_cell_holds_is_shown_as_it_is():
    texts = ['|', 'a|b', '\\', '\\|', '`', '`a`', '``', 'a * b * c', '<b>', 'a\r\nb\u2028c', '$x$', '']
    html = mistune.create_markdown(plugins=['table'])(markdown_table('T', [{'x|y': text, 'n': 1} for text in texts]))
    found = re.findall('<td[^>]*>(.*?)</td>', html)
    unescaped = [text.replace('&lt;', '<').replace('&gt;', '>') for text in found]
    assert unescaped[::2]==[' '.join(text.splitlines()) for text in texts]
    assert set(unescaped[1::2])=={'1'} and len(found)==2*len(texts)

def truncated(file, *_): file.write_bytes(file.read_bytes()[:-50])
def emptied(file, *_): file.write_bytes(b'')
def flipped(file, *_): file.write_bytes(file.read_bytes()[:-1]+bytes([file.read_bytes()[-1]^1]))
def copied(file, other): shutil.copy(other, file)
def rewritten(file, *_, tensors=lambda t: t, about=lambda a: a):
    found = load_tensors(file)
    save_tensors(file, tensors(found[0]), **about(found[1]))

DAMAGE = dict(
    truncated=truncated, emptied=emptied, flipped=flipped, copied=copied,
    no_seconds=partial(rewritten, about=lambda a: {k: v for k, v in a.items() if k!='seconds'}),
    seconds_as_text=partial(rewritten, about=lambda a: a | dict(seconds='1')),
    spent_nan=partial(rewritten, about=lambda a: a | dict(spent=math.nan)),
    config_as_list=partial(rewritten, about=lambda a: a | dict(config=[1, 2])),
    nothing_known=partial(rewritten, about=lambda a: {}),
    no_logits=partial(rewritten, tensors=lambda t: {k: v for k, v in t.items() if k!='logits'}),
    fewer_rows=partial(rewritten, tensors=lambda t: {k: v[:1] for k, v in t.items()}),
    scalars=partial(rewritten, tensors=lambda t: {k: v.float().mean() for k, v in t.items()}))

@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_damaged_stages_are_found_first_said_and_measured_again(study, tmp_path, damage):
    "Here the last two stages in order, one of them an attack, while the first is missing"
    folder = study(tmp_path/'out')
    expected = (folder/'images.csv').read_text()
    first, *_, last = study.measured
    files = {stage: next((folder/'stages').glob(f'*-{stage.what.lower()}-{stage.first}-*')) for stage in study.measured}
    other = study.measured[-2]
    files[first].unlink()
    kept = files[other].read_bytes()
    damage(files[last], files[other])
    study(folder)
    assert set(study.measured)=={first, last} and files[other].read_bytes()==kept
    at = [n for n, line in enumerate(study.said) if files[last].name in line]
    assert at and at[0]<study.said.index('measuring'), study.said
    assert (folder/'images.csv').read_text()==expected
    study(folder)
    assert not study.measured

def test_settings_that_are_a_list_are_measured_again(study, tmp_path, monkeypatch):
    folder = study(tmp_path/'out')
    monkeypatch.setattr(results, 'load_tensors', lambda file: (load_tensors(file)[0], [load_tensors(file)[1]]))
    assert not results._is_done(next((folder/'stages').iterdir()), {}, study.said.append)
    assert 'measuring a stage again' in study.said[-1]

def test_a_backend_that_is_not_there_costs_neither_tables_nor_figure(tmp_path):
    code = f'''
from genrobust import results
from genrobust.data import Images, Splits, synthetic
x, y = synthetic(120)
splits = Splits(*[Images(x[a:b], y[a:b]) for a, b in ((0, 60), (60, 100), (100, 120))])
results.load_or_synthetic = lambda *_: ('fashion_mnist', splits)
results.reproduce(results.Preset(60, 40, 20, 4, seeds=1, draws=1), {str(tmp_path)!r}, ['cnn'], ['FGS'], device='cpu')'''
    env = dict(os.environ, MPLBACKEND='module://not_here.backend_inline', OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    assert (tmp_path/'tables.md').read_text().count('**Table')==5
    assert (tmp_path/'examples.png').read_bytes().startswith(b'\x89PNG')

def blocked(tmp_path, kind):
    out = tmp_path/('out\udcff' if kind=='not UTF-8' else 'out')
    if kind=='a file':
        out.touch()
    if kind=='below a file':
        out.touch()
        return out/'deeper'
    if kind in ('stages', *results._FILES):
        out.mkdir()
        (out/kind).touch() if kind=='stages' else (out/kind).mkdir()
    return out

@pytest.mark.parametrize('kind', ['not UTF-8', 'a file', 'below a file', 'stages', 'tables.md', 'images.csv', 'examples.png'])
def test_a_folder_that_cannot_be_written_is_one_error_before_any_work(study, tmp_path, kind):
    with pytest.raises(OSError) as error:
        study(blocked(tmp_path, kind))
    assert not study.measured and str(error.value).startswith('cannot write')
    assert str(error.value).isprintable()

@pytest.mark.parametrize('given, message', [
    (dict(models='gfz'), 'list of models'), (dict(models=Path('m.safetensors')), 'list of models'),
    (dict(models=[]), 'list of models'), (dict(models=None), 'list of models'), (dict(models=7), 'list of models'),
    (dict(attacks='FGS'), 'list of attacks'), (dict(attacks=[]), 'list of attacks'), (dict(attacks=[['FGS']]), 'no attack'),
    (dict(preset=['quick']), 'no preset'), (dict(preset=None), 'no preset'), (dict(preset=(60, 40, 20, 4)), 'no preset'),
    *[(dict(preset=TINY._replace(**size)), 'whole numbers') for size in (dict(train='60'), dict(attacked=4.), dict(draws=None), dict(seeds=True), dict(valid=math.nan), dict(apgd=[1]))]])
def test_arguments_that_make_no_study_are_one_error(study, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        study(tmp_path/'out', **given)
    assert not study.measured and not (tmp_path/'out').exists()

def test_names_are_taken_from_whatever_lists_them(study, tmp_path):
    study(tmp_path/'out', (name for name in ['cnn', 'CNN']), {'FGS': 1}, TINY._replace(train=torch.arange(61).numpy()[60]))
    assert {stage.model for stage in study.measured}=={'cnn'}

@pytest.mark.parametrize('k, n', [(-1, 5), (6, 5), (math.nan, 5), (0, -1), (1, 0), (1, math.nan), (0, -5)])
def test_a_rate_that_cannot_be_is_an_error(k, n):
    with pytest.raises(ValueError, match='0 <= k <= n'):
        wilson(k, n)

def test_without_images_nothing_is_known():
    none = pd.Series([], dtype=float)
    assert wilson(0, 0)==wilson(0., 0)==clustered(none, none)==(0, 1)
    low, high = wilson(3.75, 28)
    assert 0<low<3.75/28<high<1

def test_importing_the_study_imports_no_library_of_plots_or_tables():
    "Of its own: libraries that take long to import are imported where they are used"
    found = [node for node in ast.parse(Path(results.__file__).read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [alias.name for node in found if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in found if isinstance(node, ast.ImportFrom) and not node.level]
    assert 'json' in names
    assert not {name.partition('.')[0] for name in names} & {'pandas', 'scipy', 'seaborn', 'matplotlib', 'sklearn', 'torchvision'}

def write_study(folder, n, l2, weights='w', **frames):
    "A study of one model of two attacks, the first on `n` images, the second on 4"
    folder.mkdir()
    rows = [('m', attack, image, image%2, l2, True, False) for attack, count in (('A', n), ('B', 4)) for image in range(count)]
    columns = ['model', 'attack', 'image', 'seed', 'l2', 'success', 'initially_wrong']
    pd.DataFrame(rows, columns=columns).to_csv(folder/'images.csv', index=False)
    spent = [('m', attack, on, seconds, count) for attack, count in (('A', n), ('B', 4)) for on, seconds in (('here', l2),)]
    pd.DataFrame(spent, columns=['model', 'attack', 'on', 'seconds', 'n']).to_csv(folder/'seconds.csv', index=False)
    (folder/'settings.json').write_text(json.dumps(dict(data='fashion_mnist', draws=20, weights=dict(m=weights))))
    return folder

@pytest.mark.parametrize('turned', [False, True])
def test_of_an_attack_in_several_studies_the_one_on_most_images_counts(tmp_path, turned):
    folders = [write_study(tmp_path/'few', 2, .1), write_study(tmp_path/'many', 4, .2)][::-1 if turned else 1]
    images, seconds = (read_study(name, *folders) for name in ('images', 'seconds'))
    of = images.set_index(['attack', 'image']).l2
    assert of['A'].to_dict()==dict.fromkeys(range(4), .2)
    assert of['B'].to_dict()==dict.fromkeys(range(4), .2 if turned else .1)
    assert seconds.set_index('attack').seconds.to_dict()=={'A': .2, 'B': .2 if turned else .1}
    assert smallest_change(images, 'l2')['size'].tolist()==[.2 if turned else .1]*4

def test_one_name_for_two_models_is_an_error(tmp_path):
    folders = [write_study(tmp_path/name, 4, .1, weights=name) for name in ('one', 'two')]
    with pytest.raises(ValueError, match='one model under each name'):
        tables(*folders)

def test_strong_attacks_are_asked_for_by_name_and_known_by_all_their_parameters(study, tmp_path, monkeypatch):
    assert len(STRONG)==12 and STRONG.keys()<=ATTACKS.keys()
    assert not STRONG.keys() & set(results._chosen('standard', ['cnn'], None)[3])
    settings = [results._parameters(attack) for attack in STRONG.values()]
    assert len(set(settings))==12
    name = 'Targeted APGD, L2 1'
    study(tmp_path/'out', attacks=[name], preset=TINY._replace(apgd=4))
    assert [stage.what for stage in study.measured][-2:]==[name]*2
    monkeypatch.setitem(results.ATTACKS, name, partial(one_vs_all, apgd, steps=3, loss='dlr', p=2, eps=1))
    study(tmp_path/'out', attacks=[name], preset=TINY._replace(apgd=4))
    assert [stage.what for stage in study.measured]==[name]*2

def test_targeted_attacks_of_the_study_are_those_of_the_library(drawn):
    clf, x, y = load_pretrained('cnn', 'cpu'), drawn.test.x[:6], drawn.test.y[:6]
    for norm, p, eps in (('L2 0.5', 2, .5), ('Linf 0.1', math.inf, .1)):
        found = ATTACKS[f'Targeted APGD, {norm}'](clf, x, y, seed=3)
        expected = one_vs_all(apgd, clf, x, y, p=p, eps=eps, steps=100, loss='dlr', early_stop=True, seed=3)
        assert torch.equal(found.x_adv, expected.x_adv)
        assert (found.l2 if p==2 else found.linf).max()<=eps*(1+1e-5)
        assert found.settings['attack']=='one_vs_all(apgd)' and found.settings['eps']==eps and found.settings['steps']==100
