"The study: what it knows a model by, what it does with damaged files, what its tables can hold."

import html
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

from genrobust import study
from genrobust.attacks import apgd, one_vs_all
from genrobust.data import Images, Splits
from genrobust.models import (
    CNN,
    load_models,
    load_pretrained,
    load_tensors,
    save_model,
    save_tensors,
)
from genrobust.results import (
    ATTACKS,
    PRESETS,
    STRONG,
    Preset,
    markdown_table,
    read_study,
    reproduce,
    smallest_perturbation,
    tables,
)
from genrobust.study import FILES, Stage

TINY = Preset(train=60, valid=40, test=20, attacked=4, seeds=2, draws=1)


class Recorder:
    "Runs a tiny study, and remembers what was said and which stages were measured"

    def __init__(self, monkeypatch, drawn):
        parts = [Images(*[v[a:b] for v in drawn.test]) for a, b in ((0, 60), (60, 100), (100, 120))]
        measure = Stage.measure

        def remembered(stage, *args):
            self.measured.append(stage)
            self.said.append('measuring')
            return measure(stage, *args)

        splits = 'fashion_mnist', Splits(*parts)
        monkeypatch.setattr(study, 'load_or_synthetic', lambda *_: splits)
        monkeypatch.setattr(Stage, 'measure', remembered)

    def __call__(self, out, models=('cnn',), attacks=('FGS',), preset=TINY):
        self.measured, self.said = [], []
        return reproduce(preset, out, models, attacks, device='cpu', say=self.said.append)


@pytest.fixture
def run(monkeypatch, drawn):
    return Recorder(monkeypatch, drawn)


def weights(path, seed):
    path.parent.mkdir(exist_ok=True)
    save_model(CNN(hidden=20, seed=seed), path)
    return path


def models_in(folder):
    return list(dict.fromkeys(read_study('images', folder).model))


def test_a_model_is_known_by_its_weights_however_its_path_is_spelled(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = weights(tmp_path / 'm.safetensors', 0)
    run('out', ['m.safetensors'])
    assert len(run.measured) == 6
    shutil.copy(path, 'copy.safetensors')
    for spelling in ('./m.safetensors', path, 'copy.safetensors'):
        run('out', [spelling])
        assert not run.measured, spelling
    assert models_in('out') == ['copy']
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    run('../out', ['../m.safetensors', str(path), path])
    assert not run.measured and models_in('../out') == ['m']
    weights(path, 1)
    run('../out', [path])
    assert len(run.measured) == 6


def test_different_files_have_different_names_in_tables(run, tmp_path):
    paths = [weights(tmp_path / folder / 'M.safetensors', n) for n, folder in enumerate('ab')]
    shipped = weights(tmp_path / 'cnn.safetensors', 2)
    run(tmp_path / 'out', [*paths, shipped, 'cnn', 'CNN'])
    names = models_in(tmp_path / 'out')
    assert len(names) == 4 and names[-1] == 'cnn', names
    for name, prefix in zip(names, ('M', 'M', 'cnn')):
        assert re.fullmatch(f'{prefix}-[0-9a-f]{{8}}', name), name
    assert read_study('images', tmp_path / 'out').groupby('model').size().eq(TINY.attacked).all()
    for name in names:
        assert f'| {name.upper()} |' in (tmp_path / 'out/tables.md').read_text()


def rows_of(markdown):
    "The cells of each row of the tables in a Markdown text, heads included, as a reader sees them"
    page = mistune.create_markdown(plugins=['table'])(markdown)
    rows = re.findall('<tr>(.*?)</tr>', page, re.S)
    return [list(map(html.unescape, re.findall('<t[dh][^>]*>(.*?)</t[dh]>', row))) for row in rows]


STEMS = 'a|b', 'a`b', 'a\\', 'a\\|b', 'a\nb', '007', 'NA', 'nan', '$a$b$', 'a b', 'ä', '-', '<b>'


@pytest.mark.parametrize('stem', STEMS)
def test_any_name_of_a_file_goes_through_the_tables(run, tmp_path, stem):
    folder = run(tmp_path / 'out', [weights(tmp_path / f'{stem}.safetensors', 0)])
    shown = ' '.join(stem.upper().splitlines())
    rows = rows_of((folder / 'tables.md').read_text(encoding='utf-8'))
    heads, cells = rows[::2], rows[1::2]
    assert len(cells) == 5 and all(row[0] == shown for row in cells), cells
    assert [len(row) for row in cells] == [len(head) for head in heads]
    assert (folder / 'examples.png').stat().st_size


def test_a_name_that_is_not_utf_8_is_shown_as_text_that_is():
    seeds = iter(range(2))
    models = ['b\udcff.safetensors', 'b\udcfe.safetensors']
    names = load_models(models, lambda model: CNN(seed=next(seeds)))
    assert len(names) == 2 and all(name.encode() for name in names)


def test_what_a_cell_holds_is_shown_as_it_is():
    texts = ['|', 'a|b', '\\', '\\|', '`', '`a`', '``', '*b*', '<b>', 'a\r\nb\u2028c', '$x$', '']
    head, *rows = rows_of(markdown_table('T', [{'x|y': text, 'n': 1} for text in texts]))
    assert head == ['x|y', 'n']
    assert rows == [[' '.join(text.splitlines()), '1'] for text in texts]


def test_an_interval_is_set_small_behind_its_number():
    shown = {
        '100.0% [98.0%, 100.0%]': '100.0% <small>[98.0%, 100.0%]</small>',
        '-0.1 [-0.2, 1e-05] <b>': '-0.1 <small>[-0.2, 1e-05]</small> <b>',
        '7.5 % [3.0 %, 9 %]': '7.5 % <small>[3.0 %, 9 %]</small>',
        '[1, 2]': '[1, 2]',
        'a [b, c]': 'a [b, c]',
        '1 [a](b.ipynb)': '1 <a href="b.ipynb">a</a>',
    }
    _, *rows = rows_of(markdown_table('T', [{'x': text} for text in shown]))
    assert [cell for (cell,) in rows] == list(shown.values())
    assert markdown_table('', [{'x': 1}]) == '| x |\n| --- |\n| 1 |'


def test_the_best_number_of_a_column_is_bold():
    rows = [
        dict(model='a', n=1, rate='50.0% [40.0%, 60.0%]', l2=0.2, x='-'),
        dict(model='b', n=1, rate='9.5 %', l2=1e-05, x='-'),
        dict(model='c', n=2, rate='30.0%', l2=float('inf'), x='-'),
        dict(model='d', n=2, rate='30.0%', l2=3, x='7 of 8'),
    ]
    of = dict(highest=['rate', 'x'], lowest=['l2'])
    _, *shown = rows_of(markdown_table('T', rows, **of))
    best = '<strong>50.0%</strong> <small>[40.0%, 60.0%]</small>'
    assert [row[2] for row in shown] == [best, '9.5 %', '30.0%', '30.0%']
    assert [row[3] for row in shown] == ['0.2', '<strong>1e-05</strong>', 'inf', '3']
    assert [row[4] for row in shown] == ['-', '-', '-', '7 of 8']  # there is one number
    _, *shown = rows_of(markdown_table('T', rows + [dict(rows[1], n=2, l2=3)], **of, within=['n']))
    assert [row[2] for row in shown] == [
        best,
        '9.5 %',
        '<strong>30.0%</strong>',
        '<strong>30.0%</strong>',
        '9.5 %',
    ]
    assert [row[3] for row in shown] == ['0.2', '<strong>1e-05</strong>', 'inf', '3', '3']
    _, *shown = rows_of(markdown_table('T', [dict(v='-3 %'), dict(v='-1.5 %')], highest=['v']))
    assert shown == [['-3 %'], ['<strong>-1.5 %</strong>']]
    with pytest.raises(ValueError, match="expected columns of .*'model'.*found .*'rates'"):
        markdown_table('T', rows, highest=['rates'])


def of_bytes(change):
    return lambda file, _: file.write_bytes(change(file.read_bytes()))


def rewritten(file, _, tensors=lambda t: t, about=lambda a: a):
    found = load_tensors(file)
    save_tensors(file, tensors(found[0]), **about(found[1]))


DAMAGE = dict(
    truncated=of_bytes(lambda b: b[:-50]),
    emptied=of_bytes(lambda b: b''),
    flipped=of_bytes(lambda b: b[:-1] + bytes([b[-1] ^ 1])),
    copied=lambda file, other: shutil.copy(other, file),
    no_seconds=partial(rewritten, about=lambda a: {k: v for k, v in a.items() if k != 'seconds'}),
    seconds_as_text=partial(rewritten, about=lambda a: a | dict(seconds='1')),
    spent_nan=partial(rewritten, about=lambda a: a | dict(spent=math.nan)),
    config_as_list=partial(rewritten, about=lambda a: a | dict(config=[1, 2])),
    nothing_known=partial(rewritten, about=lambda a: {}),
    no_logits=partial(rewritten, tensors=lambda t: {k: v for k, v in t.items() if k != 'logits'}),
    fewer_rows=partial(rewritten, tensors=lambda t: {k: v[:1] for k, v in t.items()}),
    scalars=partial(rewritten, tensors=lambda t: {k: v.float().mean() for k, v in t.items()}),
)


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_damaged_stages_are_found_first_said_and_measured_again(run, tmp_path, damage):
    "Here the last two stages in order, one of them an attack, while the first is missing"
    folder = run(tmp_path / 'out')
    expected = (folder / 'images.csv').read_text()
    first, *_, last = run.measured
    files = {
        stage: next((folder / 'stages').glob(f'*-{stage.what.lower()}-{stage.first}-*'))
        for stage in run.measured
    }
    other = run.measured[-2]
    files[first].unlink()
    kept = files[other].read_bytes()
    damage(files[last], files[other])
    run(folder)
    assert set(run.measured) == {first, last} and files[other].read_bytes() == kept
    at = [n for n, line in enumerate(run.said) if files[last].name in line]
    assert at and at[0] < run.said.index('measuring'), run.said
    assert (folder / 'images.csv').read_text() == expected
    run(folder)
    assert not run.measured


def test_settings_that_are_a_list_are_measured_again(run, tmp_path, monkeypatch):
    run(tmp_path / 'out')
    load_tensors = study.load_tensors
    bad = run.measured[-1]

    def as_list(file):
        tensors, about = load_tensors(file)
        return tensors, ['a', 'list'] if bad.what.lower() in file.name else about

    monkeypatch.setattr(study, 'load_tensors', as_list)
    with pytest.raises(ValueError, match='another stage'):
        run(tmp_path / 'out')
    assert bad in run.measured and any('measuring a stage again' in line for line in run.said)


@pytest.mark.parametrize('read', [tables, partial(read_study, 'images')])
def test_no_folder_is_one_error(read):
    with pytest.raises(ValueError, match='at least one folder'):
        read()


def test_a_backend_that_is_not_there_costs_neither_tables_nor_figure(tmp_path):
    code = f"""
from genrobust import results, study
from genrobust.data import Images, Splits, synthetic
x, y = synthetic(120)
splits = Splits(*[Images(x[a:b], y[a:b]) for a, b in ((0, 60), (60, 100), (100, 120))])
study.load_or_synthetic = lambda *_: ('fashion_mnist', splits)
preset = results.Preset(60, 40, 20, 4, seeds=1, draws=1)
results.reproduce(preset, {str(tmp_path)!r}, ['cnn'], ['FGS'], device='cpu')"""
    env = dict(os.environ, MPLBACKEND='module://not_here.backend_inline', OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'tables.md').read_text().count('**Table') == 5
    assert (tmp_path / 'examples.png').read_bytes().startswith(b'\x89PNG')


def blocked(tmp_path, kind):
    out = tmp_path / ('out\udcff' if kind == 'not UTF-8' else 'out')
    if kind == 'a file':
        out.touch()
    if kind == 'below a file':
        out.touch()
        return out / 'deeper'
    if kind in ('stages', *FILES):
        out.mkdir()
        (out / kind).touch() if kind == 'stages' else (out / kind).mkdir()
    return out


KINDS = 'not UTF-8', 'a file', 'below a file', 'stages', *FILES


@pytest.mark.parametrize('kind', KINDS)
def test_a_folder_that_cannot_be_written_is_one_error_before_any_work(run, tmp_path, kind):
    with pytest.raises(OSError) as error:
        run(blocked(tmp_path, kind))
    assert not run.measured and str(error.value).startswith('cannot write')
    assert str(error.value).isprintable()


NO_MODELS = 'gfz', b'gfz', Path('m.safetensors'), [], (), None, 7
NO_SIZES = (
    dict(train='60'),
    dict(attacked=4.0),
    dict(draws=None),
    dict(seeds=True),
    dict(valid=math.nan),
    dict(apgd=[1]),
)
NO_STUDY = [
    *[(dict(models=models), 'list of models') for models in NO_MODELS],
    *[(dict(attacks=attacks), 'list of attacks') for attacks in ('FGS', [], 7)],
    (dict(attacks=[['FGS']]), 'no attack'),
    (dict(attacks=['ZOO']), 'has no images'),
    *[(dict(preset=preset), 'no preset') for preset in (['quick'], None, tuple(TINY), 'Quick', {})],
    *[(dict(preset=TINY._replace(**size)), 'whole numbers') for size in NO_SIZES],
    (dict(preset=TINY._replace(zoo=-1)), 'at least one'),
    (dict(preset=TINY._replace(attacked=0), attacks=None), 'at least one attack'),
]


@pytest.mark.parametrize('given, message', NO_STUDY)
def test_arguments_that_make_no_study_are_one_error(run, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / 'out', **given)
    assert not run.measured and not (tmp_path / 'out').exists()


def test_names_are_taken_from_whatever_lists_them(run, tmp_path):
    preset = TINY._replace(train=torch.tensor([60]).numpy()[0])
    run(tmp_path / 'out', (name for name in ['cnn', 'CNN']), {'FGS': 1}, preset)
    assert {stage.model for stage in run.measured} == {'cnn'}


def write_study(folder, n, l2, weights='w'):
    "A study of one model under two attacks, the first on `n` images, the second on 4"
    folder.mkdir()
    counts = dict(A=n, B=4)
    rows = [
        dict(attack=attack, image=image, seed=image % 2, l2=l2)
        for attack, count in counts.items()
        for image in range(count)
    ]
    images = pd.DataFrame(rows).assign(model='m', success=True, initially_wrong=False)
    images.to_csv(folder / 'images.csv', index=False)
    spent = pd.DataFrame(dict(attack=counts.keys(), n=counts.values()))
    spent.assign(model='m', on='here', seconds=l2).to_csv(folder / 'seconds.csv', index=False)
    settings = dict(data='fashion_mnist', draws=20, weights=dict(m=weights))
    (folder / 'settings.json').write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize('turned', [False, True])
def test_of_an_attack_in_several_studies_most_images_count_and_least_time(tmp_path, turned):
    folders = [write_study(tmp_path / 'few', 2, 0.1), write_study(tmp_path / 'many', 4, 0.3)]
    if turned:
        folders.reverse()
    images, seconds = (read_study(name, *folders) for name in ('images', 'seconds'))
    of = images.set_index(['attack', 'image']).l2
    assert of['A'].to_dict() == dict.fromkeys(range(4), 0.3)
    assert of['B'].to_dict() == dict.fromkeys(range(4), 0.3 if turned else 0.1)
    assert seconds.set_index('attack').seconds.to_dict() == {'A': 0.1, 'B': 0.1}
    assert smallest_perturbation(images, 'l2')['size'].tolist() == [0.3 if turned else 0.1] * 4


def test_attacks_of_one_image_on_several_latents_are_not_mixed():
    one = dict(image=[0, 1], norm='l2', success=True, initially_wrong=False, l2=0.1)
    rows = [pd.DataFrame(dict(one, attack=name, seed=seed)) for name, seed in (('a', 0), ('b', 1))]
    assert len(smallest_perturbation(rows[0], 'l2')) == 2
    with pytest.raises(ValueError, match='several seeds'):
        smallest_perturbation(pd.concat(rows), 'l2')


def test_one_name_for_two_models_is_an_error(tmp_path):
    folders = [write_study(tmp_path / name, 4, 0.1, weights=name) for name in ('one', 'two')]
    with pytest.raises(ValueError, match='one model under each name'):
        tables(*folders)


def test_strong_attacks_are_asked_for_and_known_by_all_parameters(run, tmp_path, monkeypatch):
    assert len(STRONG) == 12 and STRONG.keys() <= ATTACKS.keys()
    assert not STRONG.keys() & set(study._chosen(None, 'standard', PRESETS['standard']))
    clf = CNN(hidden=20)
    stages = [Stage('cnn', attack, 0, 4) for attack in STRONG]
    assert (
        len({stage.settings('synthetic', 'weights', clf.config, 1)['attack'] for stage in stages})
        == 12
    )
    name = 'Targeted APGD, L2 1'
    run(tmp_path / 'out', attacks=[name], preset=TINY._replace(apgd=4))
    assert [stage.what for stage in run.measured][-2:] == [name] * 2
    other = partial(one_vs_all, apgd, steps=3, loss='dlr', p=2, eps=1)
    monkeypatch.setitem(ATTACKS, name, other)
    run(tmp_path / 'out', attacks=[name], preset=TINY._replace(apgd=4))
    assert [stage.what for stage in run.measured] == [name] * 2


def test_targeted_attacks_of_the_study_are_those_of_the_library(drawn):
    clf, x, y = load_pretrained('cnn', 'cpu'), drawn.test.x[:6], drawn.test.y[:6]
    for norm, p, eps in (('L2 0.5', 2, 0.5), ('Linf 0.1', math.inf, 0.1)):
        found = ATTACKS[f'Targeted APGD, {norm}'](clf, x, y, seed=3)
        how = dict(p=p, eps=eps, steps=100, loss='dlr', early_stop=True)
        expected = one_vs_all(apgd, clf, x, y, seed=3, **how)
        assert torch.equal(found.x_adv, expected.x_adv)
        assert (found.l2 if p == 2 else found.linf).max() <= eps * (1 + 1e-5)
        assert (how | dict(attack='one_vs_all(apgd)')).items() <= found.settings.items()


def test_a_study_is_of_one_data_set(run, tmp_path):
    with pytest.raises(ValueError, match='not for fashion_mnist: they were trained on mnist'):
        run(tmp_path / 'out', ['cnn_mnist'])
    folder = run(tmp_path / 'out')
    settings = folder / 'settings.json'
    settings.write_text(settings.read_text().replace('fashion_mnist', 'synthetic'))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match='holds a study of synthetic, not of fashion_mnist'):
        run(folder)
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
