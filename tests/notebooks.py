"Run notebooks and save what they show: `python tests/notebooks.py fast|slow [NAME...]`; print the index as README.md: `readme`; or make the pages that Quarto renders, in `_proc/`: `pages`."

import ast
import gc
import os
import re
import shutil
import sys
from base64 import b64decode, b64encode
from configparser import ConfigParser
from functools import cache
from io import BytesIO
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT / 'settings.ini')
SETTINGS = SETTINGS['DEFAULT']
SITE = '{doc_host}{doc_baseurl}'.format(**SETTINGS)
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
MODULES = [
    path
    for path in sorted((ROOT / 'genrobust').rglob('*.py'))
    if path.name not in ('_modidx.py', '__init__.py', '__main__.py')
]
FENCE = re.compile('^```.*?^```', re.M | re.S)


@cache
def cells(path):
    "Of a notebook; whoever changes one reads it anew"
    return nbformat.read(path, as_version=4).cells


def parsed(cell):
    "The statements of a cell, without commands of the shell and of IPython"
    return ast.parse(re.sub(r'^[!%].*', '', cell.source, flags=re.M))


def directives(cell):
    "The nbdev directives of a cell: the words after `#|`"
    return {line[2:].split()[0] for line in cell.source.splitlines() if line.startswith('#|')}


def slim(output):
    "A PNG without channels that say nothing: transparency of opaque pictures, colours of grey ones"
    data = output.get('data', {})
    if 'image/png' not in data:
        return
    with Image.open(BytesIO(b64decode(data['image/png']))) as picture:
        is_opaque = picture.mode != 'RGBA' or picture.getextrema()[3][0] == 255
        rgb = picture.convert('RGB')
    red, green, blue = rgb.split()
    if is_opaque:
        content = BytesIO()
        is_grey = red.tobytes() == green.tobytes() == blue.tobytes()
        (red if is_grey else rgb).save(content, 'png', optimize=True)
        data['image/png'] = b64encode(content.getvalue()).decode()


def execute(*names, slow):
    "Run all notebooks, or those named, in place; without `slow`, slow cells keep the outputs they have."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell

    os.chdir(ROOT / 'nbs')
    for path in sorted(Path().glob('*.ipynb')):
        if names and path.stem not in names:
            continue
        print(path.name, flush=True)
        nb, shell = read_nb(path), CaptureShell(path, mpl_format='retina')
        for cell in nb.cells:
            if cell.cell_type != 'code' or 'slow' in directives(cell) and not slow:
                continue
            cell.outputs = []
            shell.cell(cell)
            if shell.exc:
                sys.exit(f'{path}: {shell.prettytb(path)}')
            for output in cell.outputs:
                slim(output)
        write_nb(nb, path)


def readme():
    "README.md as text, and its figures by their path: the index without hidden cells and directives."
    nb = nbformat.read(ROOT / 'nbs/index.ipynb', as_version=4)
    nb.metadata.language_info = dict(name='python')
    nb.cells = [cell for cell in nb.cells if 'hide' not in directives(cell)]
    alts = re.findall('^#\\| fig-alt: (.*)', '\n'.join(cell.source for cell in nb.cells), re.M)
    for cell in nb.cells:
        cell.metadata.transient = dict(remove_source='echo:' in directives(cell))
        cell.source = '\n'.join(
            line for line in cell.source.splitlines() if not line.startswith('#|')
        )
    text, resources = MarkdownExporter().from_notebook_node(
        nb, dict(output_files_dir='results/readme', unique_key='figure')
    )
    text = re.sub(r'(\]\([^)]+\))\{[^}]*\}', r'\1', text)  # classes of links, buttons say
    text = text.replace('](try_it.ipynb)', f']({SITE}/try_it.html)')  # GitHub would not run it
    text = re.sub(
        r'\]\((\w+\.ipynb)(#[-\w]+)?\)', r'](nbs/\1\2)', text
    )  # pages of the site are files in nbs/
    for alt in alts:
        text = text.replace('![png]', f'![{alt}]', 1)
    text = (
        re.sub(r'\n{3,}', '\n\n', '\n'.join(line.rstrip() for line in text.strip().splitlines()))
        + '\n'
    )
    return text, resources['outputs']


def write_readme():
    text, figures = readme()
    (ROOT / 'README.md').write_text(text, encoding='utf-8')
    shutil.rmtree(ROOT / 'results/readme', ignore_errors=True)
    for name, content in figures.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(content)


def unlink(text):
    "Markdown without the links that nbdev writes into fenced code, where they are shown as they are"
    link = re.compile(r'\[(`[^`\n]+`)\]\(https?://[^)\n]+\)')
    return FENCE.sub(lambda fence: link.sub(r'\1', fence[0]), text)


def declaration(source, name):
    "A class of a module as readers want to see it: its bases and its fields, with their comments"
    node = next(n for n in ast.parse(source).body if getattr(n, 'name', '') == name)
    head = f'class {name}({", ".join(map(ast.unparse, node.bases))})'
    ends = [field.end_lineno for field in node.body if isinstance(field, ast.AnnAssign)]
    if not ends:
        return head
    lines = source.splitlines()[node.lineno : ends[-1]]
    if ast.get_docstring(node):
        del lines[: node.body[0].end_lineno - node.lineno]
    return '\n'.join([f'{head}:', *(line for line in lines if line.strip())])


def with_fields(text):
    "Documentation in which no class is shown as `(*args, **kwargs)`, as nbdev has it of named tuples and errors"
    module = re.search(r'^\[source\]\(\S+?/blob/\w+/([^#]*)#', text, re.M)
    if not module:
        return text
    source = (ROOT / module[1]).read_text(encoding='utf-8')
    starred = re.compile(r'^def ([A-Z]\w*)\(\n    \*args, \*\*kwargs\n\):$', re.M)
    return starred.sub(lambda shown: declaration(source, shown[1]), text)


def upright(text):
    "Documentation whose first line is not in italics, since a sentence may go on in the next one"
    return re.sub(r'(^```\n\n)\*(.*)\*$', r'\1\2', text, flags=re.M)


def pages():
    """The pages of the site, in `_proc/`: as nbdev makes them, but for the code of their documentation.

    Not by `nbdev_proc_nbs`: without Quarto that would install it as root, and this package anew."""
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    os.chdir(ROOT)
    refresh_quarto_yml()
    proc_nbs(n_workers=0, force=True)
    for path in sorted((ROOT / '_proc').glob('*.ipynb')):
        nb = nbformat.read(path, as_version=4)
        for cell in nb.cells:
            if cell.cell_type == 'markdown':
                cell.source = unlink(cell.source)
            for output in cell.get('outputs', []):
                data = output.get('data', {})
                if 'text/html' in data:  # for which Quarto loads scripts from elsewhere
                    data['text/markdown'] = f'```{{=html}}\n{data.pop("text/html")}\n```'
                elif 'text/markdown' in data:
                    text = unlink(data['text/markdown'])
                    data['text/markdown'] = upright(with_fields(text))
        nbformat.write(nb, path)
    gc.freeze()  # fifty shells of IPython collect garbage at exit, one after the other


if __name__ == '__main__':
    command, *names = sys.argv[1:]
    if command == 'readme':
        write_readme()
    elif command == 'pages':
        pages()
    else:
        execute(*names, slow=command == 'slow')
