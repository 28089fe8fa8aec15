"Every notebook is a chapter to read, and every module is code to read: what of that can be counted."

import ast
import json
import re

import pytest
from notebooks import MODULES, NOTEBOOKS, cells, directives, parsed

REFERENCE = ['api', 'glossary', 'how_it_is_built', 'index', 'references', 'try_it']
CHAPTERS = [path for path in NOTEBOOKS if path.stem not in REFERENCE]
each_chapter = pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)

# What this book used to say, where the field has a word that readers search for.
IDIOMS = (
    r'turned? away|let through|trained against|stand-ins?\b|stands? in for|yardstick|\bpaint(?!s?\b)|\bpainters?\b'
    r'|still copy|stands? still|held still|\blooks? (?:before|after)\b|(?:first|last) look\b|queries alone|labels alone'
    r'|Euclidean norm|maximum norm|\bcontests?\b|\bslips?\b|noise of its own|fresh noise|\bslipped\b|the guard\b'
)


def source_lines(cell):
    "Lines of a code cell, without blank ones and directives"
    return [line for line in cell.source.splitlines() if line.strip() and line[:2] != '#|']


def is_shown(cell):
    return 'hide' not in directives(cell) and 'default_exp' not in directives(cell)


def has_picture(cell):
    if cell.cell_type == 'markdown':
        return '$$' in cell.source or '![' in cell.source
    return any('image/png' in output.get('data', {}) for output in cell.outputs)


@each_chapter
def test_opens_with_what_matters(path):
    "A callout *In short* of at most 110 words, and a picture or a formula among the first five cells that are shown"
    shown = [cell for cell in cells(path) if cell.cell_type == 'markdown' or is_shown(cell)]
    text = re.search(
        r'^::: \{\.callout-\w+ title="In short"\}\n(.*?)\n:::', shown[2].source, re.M | re.S
    )
    assert text and 3 <= len(text[1].split('\n')) <= 5
    assert len(text[1].split()) <= 110
    imports = [cell for cell in shown if re.search(r'^(?:import|from) ', cell.source, re.M)]
    assert any(has_picture(cell) for cell in [c for c in shown if c not in imports][2:7])


@each_chapter
def test_cells_are_short(path):
    "At most 30 lines, unless a cell is one class or one function"
    for cell in cells(path):
        if cell.cell_type != 'code' or '! [' in cell.source:
            continue
        body = parsed(cell).body
        is_one = len(body) == 1 and isinstance(body[0], (ast.ClassDef, ast.FunctionDef))
        assert is_one or len(source_lines(cell)) <= 30, cell.source


@each_chapter
def test_the_most_instructive_code_stands_open(path):
    "One to three cells, each of at most 30 lines; all others are folded"
    shown = [cell for cell in cells(path) if '#| code-fold: false' in cell.source.splitlines()]
    assert 1 <= len(shown) <= 3
    for cell in shown:
        assert cell.cell_type == 'code' and is_shown(cell) and 'slow' not in directives(cell)
        assert 3 <= len(source_lines(cell)) <= 30, cell.source


@each_chapter
def test_ends_with_exercises_and_papers(path):
    "What was found, two exercises whose folded answers are tests, and the papers in the bibliography"
    found = cells(path)
    text = '\n'.join(cell.source for cell in found if cell.cell_type == 'markdown')
    headings = re.findall(r'^## (.*)', text, re.M)
    assert headings[-3:] == ['What was found', 'Exercises', 'References'], headings
    start = next(n for n, c in enumerate(found) if re.search('^## Exercises', c.source, re.M))
    answers = [cell for cell in found[start:] if cell.cell_type == 'code']
    assert len(answers) == 2
    for cell in answers:
        assert '#| code-fold: true' in cell.source and re.search(r'\bassert\b|\btest_', cell.source)
    assert 'references.ipynb#' in text[text.index('## References') :]


def prose(path):
    "Markdown, docstrings and what cells print"
    for cell in cells(path):
        if cell.cell_type == 'markdown':
            yield cell.source
            continue
        for node in ast.walk(parsed(cell)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ''
        yield json.dumps([output.get('text', '') for output in cell.outputs])


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_speaks_the_language_of_the_field(path):
    for text in prose(path):
        assert not re.search(IDIOMS, text), (re.search(IDIOMS, text)[0], text[:300])


def functions(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@each_module
def test_functions_are_short_and_take_few_arguments(path):
    "At most 40 lines, but for parsers of the command line; a private one at most six arguments"
    for f in functions(path):
        lines = f.end_lineno - f.lineno + 1
        assert lines <= 40 or path.name == 'cli.py' and f.name.startswith('_add_'), (f.name, lines)
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        is_private = f.name.startswith('_') and not f.name.startswith('__')
        assert not is_private or len(arguments) <= 6, f.name


@each_module
def test_lines_of_modules_fit_on_the_screen(path):
    "100 columns, but for the list of names that nbdev writes"
    text = re.sub(r'^__all__ = \[.*?\]$', '', path.read_text(), flags=re.M | re.S)
    long = [line for line in text.splitlines() if len(line) > 100]
    assert not long, long


@each_module
def test_classes_stand_whole_and_modules_keep_their_own(path):
    "No method is added from elsewhere, and no module imports a private name of another"
    text = path.read_text()
    assert '@patch' not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.level or 'genrobust' in node.module):
            private = [alias.name for alias in node.names if alias.name.startswith('_')]
            assert not [name for name in private if not name.startswith('__')], (path, private)


@each_module
def test_public_signatures_are_annotated(path):
    "Each parameter of a public function or method has a type, and so has what it returns"
    tree = ast.parse(path.read_text())
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != '_']
    methods = [f for c in classes for f in c.body if isinstance(f, ast.FunctionDef)]
    for f in [n for n in tree.body if isinstance(n, ast.FunctionDef)] + methods:
        if f.name.startswith('_'):
            continue
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ('self', 'cls')]
        assert not bare, (f.name, bare)
        is_attack = any(
            'attack' in ast.unparse(d) or 'contextmanager' in ast.unparse(d)
            for d in f.decorator_list
        )
        assert f.returns is not None or is_attack, f.name
