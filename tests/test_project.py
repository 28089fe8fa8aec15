"The house: notebooks, site, README and package agree with one another."

import ast
import base64
import dis
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import CodeType

import nbformat
import pytest
import torch
import yaml
from bs4 import BeautifulSoup
from notebooks import (
    FENCE,
    MODULES,
    NOTEBOOKS,
    ROOT,
    SETTINGS,
    cells,
    directives,
    parsed,
    readme,
    unlink,
    upright,
    with_fields,
)
from PIL import Image

import genrobust
from genrobust import _modidx, cli
from genrobust.files import claimed

NAMES = ['.'.join(p.relative_to(ROOT / 'genrobust').with_suffix('').parts) for p in MODULES]
each_module = pytest.mark.parametrize('name', NAMES)
every_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)


def test_readme_is_the_index():
    text, figures = readme()
    assert (ROOT / 'README.md').read_text() == text, 'run: make readme'
    assert {
        str(path.relative_to(ROOT)): path.read_bytes()
        for path in (ROOT / 'results/readme').iterdir()
    } == figures, 'run: make readme'
    links = re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', text)
    assert links and all((ROOT / link).exists() for link in links), links


def test_the_front_page_answers_first():
    "Answer, figure and buttons, before anything else; the README is short"
    text = (ROOT / 'README.md').read_text()
    parts = ['**The answer', '](results/readme/', '[Results](', '\n## ']
    found = [text.index(part) for part in parts]
    assert found == sorted(found)
    assert len(text[: found[0]].split()) <= 100 and len(text.split()) <= 1200


@every_notebook
def test_outputs_are_fit_to_be_shown(path):
    "Executed, without errors or warnings, and without a path of the machine that ran them"
    code = [c for c in cells(path) if c.cell_type == 'code']
    outputs = [o for c in code for o in c.outputs]
    text = json.dumps(outputs)
    assert outputs
    assert not any(o.output_type == 'error' or o.get('name') == 'stderr' for o in outputs)
    for bad in (
        str(Path.home()) + '/',
        str(ROOT),
        '/tmp/',
        'Warning: ',
        'Traceback',
        'synthetic images are used',
    ):
        assert bad not in text, bad


@every_notebook
def test_reads_as_a_chapter(path):
    "A title, a description, and text between cells; imports in cells of their own"
    found = cells(path)
    assert found[0].source.startswith('# ') and '\n> ' in found[0].source
    assert sum(c.cell_type == 'markdown' for c in found) >= 4
    for cell in found:
        if cell.cell_type != 'code' or 'slow' in directives(cell):
            continue
        body = parsed(cell).body
        imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert imports in ([], body) or 'notest' in directives(cell), cell.source


@every_notebook
def test_every_figure_can_be_read_out_and_every_page_opened_elsewhere(path):
    found = cells(path)
    for cell in found:
        if cell.cell_type == 'code' and any('image/png' in o.get('data', {}) for o in cell.outputs):
            assert yaml.safe_load(re.search(r'^#\| (fig-alt: .*)', cell.source, re.M)[1])[
                'fig-alt'
            ], cell.source
    assert found[1].source.startswith(
        f'[Open in Colab](https://colab.research.google.com/github/genrobust/genrobust/blob/{SETTINGS["branch"]}/nbs/{path.name})'
    )
    assert any('/content' in c.source and {'hide', 'eval:'} <= directives(c) for c in found)


def names(source):
    "What a cell binds, what it reads without having bound it, and what each of its functions reads"

    def inside(code):
        return [c for c in code.co_consts if isinstance(c, CodeType)]

    def read(code):
        return {
            i.argval for i in dis.get_instructions(code) if i.opname in ('LOAD_NAME', 'LOAD_GLOBAL')
        }.union(*map(read, inside(code)))

    code, bound, reads = compile(source, 'cell', 'exec'), set(), set()
    for i in dis.get_instructions(code):
        if i.opname == 'STORE_NAME':
            bound.add(i.argval)
        if i.opname == 'LOAD_NAME' and i.argval not in bound:
            reads.add(i.argval)
    of_functions = {c.co_name: read(c) for c in inside(code)}
    return bound, reads | (set().union(*of_functions.values()) - bound), of_functions


def borrowed(found):
    "Names that fast cells read, themselves or through functions, as slow cells bound them; the data sets are the same wherever they are loaded"
    of_slow, functions, bad = set(), {}, set()
    for cell in found:
        slow = 'slow' in directives(cell)
        bound, reads, of_functions = names(
            re.sub('^.*= load_or_synthetic\\(\\)$', '', cell.source, flags=re.M)
            if slow
            else cell.source
        )
        functions |= of_functions
        while more := set().union(*(functions.get(name, set()) for name in reads)) - reads - bound:
            reads |= more
        if not slow:
            bad |= reads & of_slow
        of_slow = of_slow | bound if slow else of_slow - bound
    return bad


def test_a_name_of_a_slow_cell_is_noticed():
    def of(*sources):
        first = 'x = 1\ndef f(): return g()\ndef g(): return x', '#| slow\nx = 2'
        return borrowed(map(nbformat.v4.new_code_cell, [*first, *sources]))

    assert of('x') == of('f()') == of('x = x+1') == of('[x for _ in "ab"]') == {'x'}
    own = 'x = 3; f()', '[x for x in "ab"]', 'def h(x): return x', '#| slow\nx'
    assert not of('x = 3', 'f()') and not any(map(of, own))


@every_notebook
def test_no_fast_cell_reads_what_a_slow_one_bound(path):
    "So a chapter shows the same, whether its slow cells were run or not"
    assert not borrowed(
        c for c in cells(path) if c.cell_type == 'code' and 'eval:' not in directives(c)
    )


def test_sidebar_lists_every_page_once_in_order():
    site = yaml.safe_load((ROOT / '_quarto.yml').read_text())
    first, second, *sections = site['website']['sidebar']['contents']
    listed = [page for section in sections for page in section['contents']]
    others = ['api.ipynb', 'how_it_is_built.ipynb', 'glossary.ipynb', 'references.ipynb']
    assert [first, second] == ['index.ipynb', 'try_it.ipynb'] and listed[-4:] == others
    for section in sections[:-1]:
        assert section['contents'] == sorted(section['contents'])
    assert sorted([first, second, *listed]) == sorted(p.name for p in NOTEBOOKS)
    assert yaml.safe_load((ROOT / 'nbs/_quarto.yml').read_text()) == {
        'metadata-files': ['../_quarto.yml', 'nbdev.yml']
    }


def anchors(page):
    "Of its headings, and of those that its documentation shows"
    found = cells(page)
    texts = [c.source for c in found if c.cell_type == 'markdown'] + [
        o.get('data', {}).get('text/markdown', '') for c in found for o in c.get('outputs', [])
    ]
    text = '\n'.join(texts)
    headings = {
        re.sub(r'[^\w.-]', '', heading.lower().replace(' ', '-'))
        for heading in re.findall('^#+ (.*)', text, re.M)
    }
    return headings | set(re.findall('<a id="([^"]+)"', text))


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    "The folder of the pages that Quarto renders, made once: two workers would be in each other's way"
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder
    for made in claimed([folder / 'pages']):
        if not made.exists():
            command = [sys.executable, ROOT / 'tests/notebooks.py', 'pages']
            subprocess.run(command, check=True, capture_output=True)
            made.touch()
    return ROOT / '_proc'


def test_the_site_is_processed_and_its_links_lead_somewhere(pages):
    site = f'{SETTINGS["doc_host"]}{SETTINGS["doc_baseurl"]}/'
    rendered = {re.sub(r'^[0-9]+_', '', p.stem) + '.html': p.name for p in NOTEBOOKS}
    assert {p.name for p in pages.glob('*.ipynb')} == {p.name for p in NOTEBOOKS}
    assert (
        yaml.safe_load((pages / 'nbdev.yml').read_text())['project']['output-dir']
        == SETTINGS['doc_path']
    )
    for path in pages.glob('*.ipynb'):
        for link, anchor in re.findall(
            r'(?:\]\(|(?:src|href)=")([^)#"]*)#?([^)"]*)',
            '\n'.join(c.source for c in cells(path) if c.cell_type == 'markdown'),
        ):
            link = link.removeprefix(site)
            page = pages / rendered.get(link, link or path.name)
            assert (
                link.startswith('https://')
                or page.exists()
                and (not anchor or anchor in anchors(page))
            ), (path.name, link, anchor)
        outputs = [o for c in cells(path) for o in c.get('outputs', [])]
        assert not [o for o in outputs if o.output_type == 'error']
        assert not [o for o in outputs if 'text/html' in o.get('data', {})]  # loads from a CDN
        for text in texts_of(path):
            assert not [f for f in FENCE.findall(text) if '](http' in f], (path.name, text[:200])
    links = re.findall(r'\]\((\w+\.ipynb)#?([^)]*)\)', ''.join(texts_of(pages / 'api.ipynb')))
    assert len(links) > 250
    found = {page: anchors(pages / page) for page in {page for page, _ in links}}
    missing = [(page, anchor) for page, anchor in links if anchor and anchor not in found[page]]
    assert not missing, missing
    resources = yaml.safe_load((ROOT / '_quarto.yml').read_text())['project']['resources']
    for pattern in [*resources, 'styles.css', 'fonts.scss', 'favicon.svg']:
        assert list(pages.glob(pattern)), pattern


@each_module
def test_the_api_reference_lists_every_public_name(name):
    "Where this fails, run: python tests/notebooks.py fast api"
    text = ''.join(texts_of(ROOT / 'nbs/api.ipynb')).replace('\\', '')
    public = getattr(importlib.import_module(f'genrobust.{name}'), '__all__', [])
    assert not [value for value in public if f'- [{value}](' not in text]


def texts_of(path):
    "What a page shows as Markdown: cells and outputs"
    for cell in cells(path):
        if cell.cell_type == 'markdown':
            yield cell.source
        for output in cell.get('outputs', []):
            yield output.get('data', {}).get('text/markdown', '')


def test_signatures_show_no_links():
    text = '```python\ndef f(x): # As [`g`](https://x.org/g)\n```\n[`g`](https://x.org/g)'
    assert unlink(text) == '```python\ndef f(x): # As `g`\n```\n[`g`](https://x.org/g)'


def test_no_two_modules_have_a_public_name_in_common():
    "nbdev links a name to where it was defined first, wherever the name stands"
    modules = {}
    for module, names in _modidx.d['syms'].items():
        for name in names:
            modules.setdefault(name.removeprefix(f'{module}.'), []).append(module)
    twice = {n: where for n, where in modules.items() if len(where) > 1 and n[0] != '_'}
    assert len(modules) > 500 and not twice, twice


def test_documentation_links_to_the_source_of_its_own_module(pages):
    "And no link stands inside another"
    n = 0
    for path in pages.glob('*.ipynb'):
        module = re.search(r'#\| default_exp ([\w.]+)', (ROOT / 'nbs' / path.name).read_text())
        assert not re.search(r'\[\[[^]]*\]\(', '\n'.join(texts_of(path))), path.name
        for cell in [c for c in cells(path) if '\nshow_doc(' in c.source]:
            (output,) = cell.outputs
            source = re.search(r'\[source\]\(\S+?/blob/main/([^#]*)', output.data['text/markdown'])
            assert source[1] == f'genrobust/{module[1].replace(".", "/")}.py', cell.source
            n += 1
    assert n > 300


def test_classes_show_their_fields(pages):
    "Those of named tuples and the bases of errors, where nbdev shows `*args, **kwargs`"
    shown = '\n'.join(text for path in sorted(pages.glob('*.ipynb')) for text in texts_of(path))
    assert not re.search(r'^def [A-Z]\w*\(\n    \*args', shown, re.M)
    for name in NAMES:
        module = importlib.import_module(f'genrobust.{name}')
        for public in getattr(module, '__all__', []):
            value = getattr(module, public)
            if value.__module__ != module.__name__ if inspect.isclass(value) else True:
                continue
            if issubclass(value, Exception) and '__init__' not in vars(value):
                assert f'\nclass {public}({value.__base__.__name__})\n```' in shown, public
            elif issubclass(value, tuple):
                code = re.search(
                    f'^class {public}\\(NamedTuple\\):\n(.*?)^```', shown, re.M | re.S
                )[1]
                assert re.findall(r'^    (\w+):', code, re.M) == list(value._fields), public


def test_no_sentence_of_documentation_is_half_in_italics(pages):
    assert upright('```\n\n*One *two*,*\nthree *four*.') == '```\n\nOne *two*,\nthree *four*.'
    shown = '\n'.join(text for path in pages.glob('*.ipynb') for text in texts_of(path))
    assert not re.findall(r'^```\n\n\*.*\*$', shown, re.M)


def test_a_class_that_shows_its_parameters_is_left_as_it_is():
    text = '[source](https://x.org/a/blob/main/genrobust/data.py#L1)\n```python\ndef {}\n```'
    assert with_fields(text.format('Images(\n    x, y\n):')) == text.format('Images(\n    x, y\n):')
    fields = 'class Images(NamedTuple):\n    x: Tensor'
    assert fields in with_fields(text.format('Images(\n    *args, **kwargs\n):'))


def test_the_site_reads_well():
    "Folded code, a way on, sharp figures to enlarge, tables as wide as they need, and the navbar"
    site = yaml.safe_load((ROOT / '_quarto.yml').read_text())
    html, website = site['format']['html'], site['website']
    expected = {'code-fold': True, 'code-tools': True, 'lightbox': 'auto', 'tbl-colwidths': False}
    assert expected.items() <= html.items() and html['html-math-method'] == 'mathml'
    assert (
        int(html['grid']['body-width'].removesuffix('px')) > 800
    )  # or Results' tables are cut off
    assert html['citation']['title'] == yaml.safe_load((ROOT / 'CITATION.cff').read_text())['title']
    assert website['page-navigation'] is True and website['page-footer']['left']
    assert (ROOT / 'nbs' / website['favicon']).exists()
    navbar = [*website['navbar']['left'], *website['navbar']['right']]
    assert [i['text'] for i in navbar] == ['Home', 'Results', 'Claims', 'Try it', 'API', 'GitHub']
    assert contrast(*(website['navbar'][ground] for ground in ('background', 'foreground'))) > 4.5
    for item in navbar[:-1]:
        assert (ROOT / 'nbs' / item['href']).exists()
    for theme in html['theme'].values():
        assert theme[-1] == 'fonts.scss'
    assert '$web-font-path: false' in (ROOT / 'nbs/fonts.scss').read_text()


def test_styles_are_short_and_load_nothing():
    css = re.sub(r'/\*.*?\*/', '', (ROOT / 'nbs/styles.css').read_text(), flags=re.S)
    assert len(css) < 3000 and 'http' not in css


def contrast(*colours):
    "By WCAG 2.2, of two colours such as #1b6e3c or #fff"
    luminances = []
    for colour in colours:
        digits = re.sub('^(.)(.)(.)$', r'\1\1\2\2\3\3', colour.lstrip('#'))
        rgb = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    low, high = sorted(luminances)
    return (high + 0.05) / (low + 0.05)


def test_verdicts_come_first_as_coloured_words():
    "They are legible in both themes"
    assert round(contrast('#fff', '#000'), 2) == 21
    claims = '\n'.join(texts_of(ROOT / 'nbs/13_claims.ipynb'))
    (table,) = re.findall(r'^::: \{\.stacked\}\n\n(.*?)\n\n:::$', claims, re.M | re.S)
    head, _, *rows = [
        line[2:-2].split(' | ') for line in table.splitlines() if line.startswith('|')
    ]
    assert head[:3] == ['verdict', 'claim', 'found'] and len(rows) > 20
    css = (ROOT / 'nbs/styles.css').read_text()
    words = {re.fullmatch(r'\[(\w+)\]\{\.\1\}', verdict)[1] for verdict, *_ in rows}
    assert words == {'holds', 'fails', 'undecided', 'untested'}
    for word in words - {'untested'}:
        for scheme, background in ('', '#fff'), ('.quarto-dark ', '#222'):  # cosmo, darkly
            colour = re.search(rf'^{re.escape(scheme)}\.{word} \{{ color: (#\w+);', css, re.M)[1]
            assert contrast(colour, background) > 4.5


def test_heads_of_tables_are_legible_in_both_themes():
    "They have the colours of the text, not those that a theme has for a head"
    css = (ROOT / 'nbs/styles.css').read_text()
    rule = re.search(r'^thead, thead th \{(.*?)\}', css, re.M | re.S)[1]
    assert 'color: inherit;' in rule and 'background-color: transparent;' in rule


def test_results_open_with_one_line_a_model():
    "The best in bold; all attacks on all models are folded"
    found = cells(ROOT / 'nbs/12_results.ipynb')
    before = itertools.takewhile(lambda cell: not cell.source.startswith('## '), found)
    outputs = [o for c in before for o in c.get('outputs', [])]
    (table,) = filter(None, (o.get('data', {}).get('text/markdown') for o in outputs))
    head, _, *rows = [
        line[2:-2].split(' | ') for line in table.splitlines() if line.startswith('|')
    ]
    assert len({model for model, *_ in rows}) == len(rows) >= 10
    for column in range(head.index('accuracy'), head.index('n')):
        assert any(row[column].startswith('**') for row in rows), head[column]
    for n, cell in enumerate(found):
        text = ''.join(o.get('data', {}).get('text/markdown', '') for o in cell.get('outputs', []))
        if len(text.splitlines()) > 60:
            assert 'collapse="true"' in found[n - 1].source and found[n + 1].source == ':::'


@every_notebook
def test_intervals_are_set_small(path):
    interval = re.compile(r'[\d%] \[[-+.\de]+ ?%?, [-+.\de]+ ?%?\]')
    rows = [line for text in texts_of(path) for line in text.splitlines() if line[:2] == '| ']
    assert not list(filter(interval.search, rows))


OPERATOR = '<mrow><mi mathvariant="normal">{}</mi><mo>&#8289;</mo></mrow>'  # as pandoc 3.9 has it
LOG, ARG, MAX = map(OPERATOR.format, ('log', 'arg', 'max'))
OPEN, BOTH = '<mo stretchy="false" form="prefix">(</mo>', '<mi mathvariant="normal">{}</mi>'


@pytest.mark.parametrize(
    'formula, spaced',
    [
        (f'{LOG}<mi>p</mi>{OPEN}<mi>x</mi>', ['p']),
        (f'{LOG}{OPEN}<mn>1</mn>', []),
        (f'{LOG}<mfrac><mi>p</mi><mi>q</mi></mfrac>', ['pq']),
        (f'{ARG}<msub>{MAX}<mi>c</mi></msub><mi>f</mi>', ['max\u2061c']),
        (f'<munder>{BOTH.format("min")}<mi>a</mi></munder><mi>r</mi>', ['r']),
        (f'<munder>{BOTH.format("min")}<mi>a</mi></munder>{OPEN}<mi>r</mi>', []),
        (f'<mrow>{BOTH.format("R")}{BOTH.format("A")}</mrow><mi>x</mi>', []),
        ('<munder><mo>\u2211</mo><mi>c</mi></munder><msup><mi>e</mi><mi>c</mi></msup>', []),
        ('<mi>x</mi><mo>+</mo><mi>y</mi>', []),
        ('<mrow><mi>n</mi><mo>!</mo></mrow><mi>k</mi>', []),
    ],
)
def test_a_thin_space_follows_the_names_of_functions(formula, spaced):
    css = re.sub(r'/\*.*?\*/', '', (ROOT / 'nbs/styles.css').read_text(), flags=re.S)
    (selector,) = re.findall(r'([^{}]+)\{ margin-left: \.167em; \}', css)
    page = BeautifulSoup(
        f'<math><semantics><mrow>{formula}</mrow></semantics></math>', 'html.parser'
    )
    assert [element.text for element in page.select(selector.strip())] == spaced


@every_notebook
def test_tables_are_printed_by_one_function(path):
    "No data frame as HTML or as text: what pandas prints is cut off, and loads scripts from elsewhere"
    for cell in cells(path):
        for output in cell.get('outputs', []):
            html, plain = (
                output.get('data', {}).get(f'text/{kind}', '') for kind in ('html', 'plain')
            )
            assert 'dataframe' not in html, cell.id
            assert not (plain.startswith('  ') and '\n' in plain), (cell.id, plain)
            printed = re.search(
                r'^ {2,}\S.*\n(?:\d+ {2,}\S.*\n)+|(?:^\S.* {2,}[-\d.]+\n){2}',
                f'{output.get("text", "")}\n',
                re.M,
            )
            is_example = 'head()' in cell.source and path.stem == 'index'  # a reader's own console
            assert is_example or not printed, (cell.id, printed[0])


@every_notebook
def test_pictures_are_sharp_and_carry_no_transparency(path):
    "Twice as many pixels as are shown, but in one file that the study drew before it did so"
    for cell in cells(path):
        for output in cell.get('outputs', []):
            png = output.get('data', {}).get('image/png')
            if png:
                shown = output.metadata['image/png']
                with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
                    assert picture.mode in ('L', 'RGB'), cell.id
                    assert picture.width >= 2 * shown['width'] - 1, cell.id


@each_module
def test_docstrings_keep_their_signs(name):
    "Markdown takes no `*` of a formula for emphasis, and `''` for no quotation mark"
    for node in ast.walk(
        ast.parse(Path(importlib.import_module(f'genrobust.{name}').__file__).read_text())
    ):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith('_'):
            text = re.sub('`[^`]*`', '', ast.get_docstring(node) or '')
            assert not re.search(r"\w\*\w|''", text), (node.name, text)


def test_workflows_are_valid_and_call_what_a_person_calls():
    files = sorted((ROOT / '.github/workflows').glob('*.yml'))
    checked = subprocess.run(
        [
            sys.executable,
            *'-m check_jsonschema --builtin-schema vendor.github-workflows'.split(),
            *files,
        ],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout
    jobs = {
        name: job
        for path in files
        for name, job in yaml.safe_load(path.read_text())['jobs'].items()
    }
    commands = [step['run'] for job in jobs.values() for step in job['steps'] if 'run' in step]
    targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.M)
    browser, *made = sorted(commands, key=lambda command: 'chromium' not in command)
    assert sorted(made) == ['make docs', 'make test', 'make wheel']
    assert all(command.split()[1] in targets for command in made)
    assert browser in [step.get('run') for step in jobs['test']['steps']][:-1]
    assert 'apt-get install -y chromium' in browser
    steps = jobs['publish']['steps']
    assert any(step['uses'].startswith('pypa/gh-action-pypi-publish@') for step in steps)
    assert steps[-1]['with']['attestations'] is True
    assert jobs['publish']['permissions'] == {'id-token': 'write'} and jobs['publish']['needs']
    publish = yaml.safe_load((ROOT / '.github/workflows/publish.yml').read_text())
    assert publish[True] == {'push': {'tags': ['v*']}}  # `on` is a truth value in YAML 1.1
    python = jobs['test']['strategy']['matrix']['python']
    assert python[0] == SETTINGS['min_python']
    assert f'Python {python[0]} to {python[-1]}' in (ROOT / 'README.md').read_text()


def test_every_command_that_is_shown_is_one():
    "The command line takes each line of genrobust's, the Makefile knows each target, and Python each line of its own"
    pages = [
        *(p.read_text() for p in ROOT.glob('*.md')),
        *(
            '\n'.join(c.source for c in cells(path) if c.cell_type == 'markdown')
            for path in NOTEBOOKS
        ),
    ]
    lines = [
        line.strip()
        for page in pages
        for block in re.findall(r'```sh\n(.*?)```|((?:^ {4}[^\n]+\n?)+)', page, re.M | re.S)
        for line in ''.join(block).replace('\\\n', ' ').splitlines()
    ]
    make = 'make -n reproduce study bench referee'.split()
    made = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines += made.replace('\\\n', ' ').splitlines()
    shown = '\n'.join(lines)
    commands, targets = (
        re.findall(f'^(?:torchrun .*|time )?{word} (.+)', shown, re.M)
        for word in ('genrobust', 'make')
    )
    assert len(commands) > 10 and len(targets) > 3, lines
    for line in [line for page in pages for line in re.findall(r'python -c "([^"]+)"', page)]:
        compile(line, 'line', 'exec')
    for command in commands:
        cli._parser().parse_args(shlex.split(command, comments=True))
    assert {name for target in targets for name in shlex.split(target, comments=True)} <= set(
        re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.M)
    )


def test_what_contributing_says_can_be_done(tmp_path):
    "Its attack and its model work as they stand, and what it names is there"
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    attack, model = re.findall(r'```python\n(.*?)```', text, re.S)
    found = {}
    imports = 'import torch\nfrom torch import nn, Tensor\nfrom genrobust.attacks import *\n'
    exec(imports + attack, found)
    x, linear = torch.rand(5, 1, 6, 6), torch.nn.Linear(36, 3)
    result = found['blur'](torch.nn.Sequential(torch.nn.Flatten(), linear).eval(), x, share=1)
    assert torch.allclose(result.x_adv, x.mean((2, 3), keepdim=True).expand_as(x))
    assert result.settings['share'] == 1
    x, found = torch.rand(5, 1, 28, 28), dict(vars(genrobust.models))
    exec(model, found)
    clf = found['Linear'](n_classes=3, dropout=0.1, seed=1)
    again = found['Linear'](**{k: v for k, v in clf.config.items() if k != 'name'}, seed=1)
    assert torch.equal(clf.eval()(x), again.eval()(x))
    assert clf.loss(x, torch.arange(5) % 3).ndim == 0
    for link in re.findall(r'\]\(([^)]+)\)', text):
        assert (ROOT / link).exists(), link
    for name in ('tests/notebooks.py', 'CITATION.cff', 'genrobust/pretrained/'):
        assert name in text and (ROOT / name).exists()
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == SETTINGS['version']


@each_module
def test_public_functions_are_documented(name):
    "A docstring for each; and no module bears the name of a function"
    module = importlib.import_module(f'genrobust.{name}')
    package, _, own = f'genrobust.{name}'.rpartition('.')
    assert inspect.ismodule(getattr(importlib.import_module(package), own))
    names = getattr(module, '__all__', [])
    assert own not in names
    for public in names:
        value = getattr(module, public)
        if (
            inspect.isfunction(value)
            or inspect.isclass(value)
            and value.__module__.startswith('genrobust')
        ):
            assert value.__doc__, public


def test_seeded_is_told_whose_generator():
    "The current card of a machine with several need not be the one that computes"
    unnamed = []
    for path in MODULES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        named = [call for call in calls if getattr(call.func, 'id', '') == 'seeded']
        unnamed += [(path.name, c.lineno) for c in named if len(c.args) + len(c.keywords) < 2]
    assert not unnamed


def test_the_package_says_its_version_and_what_it_needs():
    assert genrobust.__version__ == SETTINGS['version']
    assert SETTINGS['license'] == 'apache2' and 'Apache License' in (ROOT / 'LICENSE').read_text()
    for weights in (ROOT / 'genrobust/pretrained').glob('*'):
        assert weights.suffix == '.safetensors' and weights.stat().st_size < 8e6


def test_no_name_of_the_workplace():
    files = subprocess.run(
        ['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in files:
        if name.endswith(('.png', '.safetensors')) or name in (
            'Makefile',
            '.ci/run',
            'tests/test_project.py',
        ):
            continue
        assert '../shared' not in (ROOT / name).read_text(), name
