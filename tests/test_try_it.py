"The page *Try it*: its numbers, computed again, and the page in a browser."

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import threading
from importlib.resources import files

import pytest
import torch
from notebooks import ROOT, cells

from genrobust import cli
from genrobust.attacks import margin
from genrobust.detection import DETECTORS
from genrobust.models import LOG_NORMALISER, load_pretrained, predict
from genrobust.try_it import (
    Settings,
    data_digest,
    decision_regions,
    from_bytes,
    logits_of_draws,
    plane_images,
    read_sheet,
    write_try_it,
)

NBS = ROOT / 'nbs'
ABOUT = json.loads((NBS / 'try_it.json').read_text())
SETTINGS = Settings(**{k: tuple(v) if type(v) is list else v for k, v in ABOUT['settings'].items()})
N = len(SETTINGS.l2)
LABELS = torch.tensor(ABOUT['labels'])
each_model = pytest.mark.parametrize('name', SETTINGS.models)
each_bayes = pytest.mark.parametrize('name', ['gfz', 'dfz'])


@pytest.fixture(scope='module')
def clfs():
    return {name: load_pretrained(name, 'cpu') for name in SETTINGS.models}


def of(values, unit=1.0):
    "Numbers of the file as `[images,2,sizes,...]`"
    values = torch.tensor(values, dtype=torch.float64) * unit
    return values.view(len(LABELS), 2, N, -1).squeeze(3)


def tiles(name):
    return read_sheet(NBS / f'try_it.{name}.png')


def adversarial(name):
    "What the page shows under attack, `[images,2,sizes,1,28,28]`"
    return (tiles(name)[:, : 2 * N].float() / 255).unflatten(1, (2, N))


def test_the_files_are_small_and_all_there():
    found = sorted(path.name for path in NBS.glob('try_it.*'))
    sheets = [f'try_it.{name}.png' for name in SETTINGS.models]
    page = ['try_it.css', 'try_it.ipynb', 'try_it.js', 'try_it.json', 'try_it.png']
    assert found == sorted(page + sheets)
    assert sum((NBS / name).stat().st_size for name in found) < 3e6
    assert len(LABELS) >= 24 and LABELS.bincount(minlength=10).min() >= 2
    assert set(SETTINGS.models) == {'gfz', 'dfz', 'cnn', 'cnn_at'} and SETTINGS.draws == 20
    assert len(SETTINGS.linf) == N >= 11


def test_the_data_are_of_this_version_and_stale_ones_are_noticed(clfs):
    "Where this fails, weights or settings are others now: run `genrobust try-it --out nbs`"
    assert SETTINGS == Settings()
    assert ABOUT['digest'] == data_digest(SETTINGS, clfs)
    others = [clfs | {'cnn': clfs['cnn_at']}, dict(list(clfs.items())[:3])]
    stale = [data_digest(SETTINGS, other) for other in others]
    stale += [data_digest(SETTINGS._replace(**new), clfs) for new in (dict(seed=1), dict(steps=21))]
    assert len({ABOUT['digest'], *stale}) == 5


def test_the_images_are_those_of_the_test_set(fashion):
    i = torch.tensor(ABOUT['images'])
    assert torch.equal(fashion.test.y[i], LABELS) and len(i.unique()) == len(i)
    for name in SETTINGS.models:
        clean = adversarial(name)[:, :, 0]
        assert torch.allclose(clean, fashion.test.x[i, None].expand_as(clean), atol=1e-6)


@each_model
def test_numbers_can_be_computed_again(name, clfs):
    "Probabilities, log p(x,y), norms: of a few images in both norms"
    images, sizes = torch.tensor([0, 11])[:, None], torch.tensor([0, 4, 7, N - 1])
    about, clf = ABOUT['models'][name], clfs[name]
    path = adversarial(name)
    x = path.transpose(1, 2)[images, sizes].flatten(0, 2)
    logits = predict(clf.fixed(SETTINGS.seed), x).double()
    expected = of(about['logits'], 1e-3).transpose(1, 2)[images, sizes].flatten(0, 2)
    constant = LOG_NORMALISER if about['density'] else 0
    assert about['density'] == clf.has_density == (name in ('gfz', 'dfz'))
    assert torch.allclose(logits.softmax(1), expected.softmax(1), atol=1e-3)
    assert torch.allclose(logits + constant, expected, rtol=1e-5, atol=5e-3)
    delta = (path - path[:, :, :1]).flatten(3).double()
    assert torch.allclose(delta.norm(dim=3), of(about['l2'], 1e-3), atol=1e-3)
    assert torch.equal((255 * delta.abs().amax(3)).round(), of(about['linf']))
    for k, (radii, unit) in enumerate(((SETTINGS.l2, 1), (SETTINGS.linf, 1 / 255))):
        most = delta[:, k].norm(dim=2) if k == 0 else delta[:, k].abs().amax(2)
        assert (most <= torch.tensor(radii) * unit + 1e-5).all()


@each_model
def test_margins_fall_and_start_above_zero(name):
    logits = of(ABOUT['models'][name]['logits'], 1e-3)
    labels = LABELS[:, None, None].expand(logits.shape[:3])
    margins = margin(logits.flatten(0, 2), labels.flatten()).view(labels.shape)
    assert (margins[..., 0] > 0).all() and (margins.diff(dim=2) <= 2e-3).all()
    assert (margins[:, 0, -1] < 0).float().mean() > 0.5


def test_in_short_agrees_with_the_data():
    "Successes of the attack by model and norm, and what becomes of those on GFZ"
    wrong = {}
    for name, about in ABOUT['models'].items():
        predicted = of(about['logits']).argmax(3)
        wrong[name] = predicted != LABELS[:, None, None].expand(predicted.shape)
    n = {name: found.sum((0, 2)) for name, found in wrong.items()}
    assert (n['gfz'] < n['cnn']).all() and (n['gfz'] < n['dfz']).all()
    assert (n['cnn_at'] < n['gfz']).all()
    draws = of(ABOUT['models']['gfz']['wrong']).view_as(wrong['gfz'])[wrong['gfz']]
    assert 1 / 3 < 1 - draws.mean() / SETTINGS.draws < 2 / 5
    assert 'More than a third' in '\n'.join(cell.source for cell in cells(NBS / 'try_it.ipynb'))


@each_bayes
def test_resampled_latents_can_be_computed_again(name, clfs):
    about, at = ABOUT['models'][name], (3, 0, 7)
    draws = logits_of_draws(clfs[name], adversarial(name)[at][None], 20, SETTINGS.seed + 1)
    probabilities = draws.softmax(1).mean(2)[0].double()
    assert torch.allclose(probabilities, of(about['fresh_probabilities'], 1e-4)[at], atol=1e-3)
    joint = draws.mean(2)[0].double() + LOG_NORMALISER
    assert torch.allclose(joint, of(about['fresh_logits'], 1e-3)[at], rtol=1e-5, atol=5e-3)
    assert (draws.argmax(1) != LABELS[3]).sum() == of(about['wrong'])[at]
    for kind, found in about['detectors'].items():
        scores = torch.stack([scored(clfs[name], kind, found, draw) for draw in draws.unbind(2)])
        assert (scores > found['threshold']).sum() == of(found['rejected'])[at]


def scored(clf, kind, found, logits):
    detector = DETECTORS[kind](clf)
    detector.statistics = {k: torch.tensor(v) for k, v in found['statistics'].items()}
    return detector.judge(logits)


@each_model
def test_verdicts_of_detectors_follow_from_the_logits(name, clfs):
    about = ABOUT['models'][name]
    logits = torch.tensor(about['logits']).view(-1, 10) / 1000
    logits = logits - (LOG_NORMALISER if about['density'] else 0)
    assert set(about['detectors']) == ({'logit', 'marginal', 'kl'} if about['density'] else {'kl'})
    for kind, found in about['detectors'].items():
        scores = scored(clfs[name], kind, found, logits).double()
        assert torch.allclose(
            scores, torch.tensor(found['scores']).double() / 1000, rtol=1e-2, atol=5e-3
        )
        clean = of(found['scores'], 1e-3)[:, :, 0] > found['threshold']
        assert clean.float().mean() < 0.3


@each_model
def test_planes_can_be_computed_again(name, clfs):
    k, step = 5, (SETTINGS.shown - 1) // (SETTINGS.nodes - 1)
    sheet, plane = tiles(name), ABOUT['models'][name]['plane']
    u = from_bytes(sheet[[k], 2 * N], torch.tensor([plane['unit'][k]]))
    v = from_bytes(sheet[[0], 2 * N + 1], torch.tensor([plane['random_unit']]))
    assert abs(u.norm() - 1) < 0.01 and abs(v.norm() - 1) < 0.01
    images = plane_images(adversarial(name)[[k], 0, 0], u, v, SETTINGS)
    again = decision_regions(clfs[name], images, SETTINGS)[0]
    texts = plane['regions'][k]
    shown = torch.tensor([[int(c) for c in text] for text in texts]).view_as(again)
    assert len(texts) == (SETTINGS.plane_draws if 'wrong' in ABOUT['models'][name] else 1)
    assert (shown == again).float().mean() > 0.995
    i = SETTINGS.axes[0].tolist().index(0), SETTINGS.axes[1].tolist().index(0)
    assert shown[0, step * i[1], step * i[0]] == LABELS[k]
    inside = SETTINGS.axes[0] * 1000 < plane['distance'][k] - 50
    assert (shown[0, step * i[1], ::step][inside & (SETTINGS.axes[0] >= 0)] == LABELS[k]).all()


def test_the_command_makes_such_files(fashion, tmp_path, capsys):
    few = dict(n_images=10, steps=3, l2=(0, 1), linf=(0, 8), n_detector=600)
    settings, folders = Settings(models=('cnn',), **few), [tmp_path / 'a', tmp_path / 'b']
    for folder in folders:
        write_try_it(folder, settings, device='cpu', say=lambda line: None)
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ['try_it.cnn.png', 'try_it.json', 'try_it.png']
    for name in ('try_it.cnn.png', 'try_it.json'):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    (tmp_path / 'file').touch()
    assert cli.main(['try-it', '--out', str(tmp_path / 'file' / 'x')]) == 2
    assert cli.main(['try-it', '--out', str(tmp_path / 'c'), '--data', 'nothing']) == 2
    assert 'no data set' in capsys.readouterr().err and not (tmp_path / 'c').exists()


# ---- the page in a browser


def blocks():
    "The raw HTML of the page, in order, and its headings"
    for cell in cells(NBS / 'try_it.ipynb'):
        if cell.cell_type == 'markdown':
            pattern = r'^(#+) ([^\n]*)$|```\{=html\}\n(.*?)\n```'
            for level, heading, raw in re.findall(pattern, cell.source, re.M | re.S):
                yield raw or f'<h{len(level)}>{heading}</h{len(level)}>'


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Try it</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{margin: 0 12px; font: 17px/1.5 sans-serif}} body.quarto-dark {{background: #222; color: #eee}}</style></head>
<body class="{}"><main>{}</main></body></html>"""


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    "A page around the raw blocks, as Quarto makes one, light and dark"
    folder = tmp_path_factory.mktemp('site')
    for path in NBS.glob('try_it.*'):
        shutil.copy(path, folder)
    for theme in ('light', 'dark'):
        (folder / f'{theme}.html').write_text(PAGE.format(f'quarto-{theme}', '\n'.join(blocks())))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    found = [shutil.which(name) for name in ('chromium', 'chromium-browser', 'google-chrome')]
    if not any(found):
        pytest.skip('no Chromium is installed')
    with playwright.sync_playwright() as p:
        sandbox = ['--no-sandbox'] if os.geteuid() == 0 else []
        with contextlib.closing(
            p.chromium.launch(executable_path=next(filter(None, found)), args=sandbox)
        ) as one:
            yield one


@contextlib.contextmanager
def opened(browser, address, width, **how):
    "A page, whose console holds no error when it is left"
    page, errors = browser.new_page(viewport=dict(width=width, height=800), **how), []
    page.on('console', lambda m: errors.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(address)
    if how.get('java_script_enabled', True):
        page.wait_for_selector('#try-it[data-ready=true]')
    yield page
    page.close()
    assert not errors, errors


def text(page, name):
    return page.inner_text(f'#try-{name}').replace('\u2212', '-')


@pytest.mark.parametrize('width', [1280, 390])
def test_the_page_can_be_used_by_mouse_and_by_keyboard(browser, address, width):
    with opened(browser, f'{address}/light.html', width) as page:
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        for image, name, norm in ((2, 'cnn', 'linf'), (9, 'gfz', 'l2')):
            page.click(f'label[for=try-model-{name}]')
            page.click(f'#try-image-{image}')
            page.click(f'label[for=try-norm-{norm}]')
            page.focus('#try-size')
            page.keyboard.press('End')
            page.keyboard.press('ArrowLeft')
            at, label = (image, ['l2', 'linf'].index(norm), N - 2), ABOUT['labels'][image]
            logits = of(ABOUT['models'][name]['logits'], 1e-3)[at]
            says = ABOUT['classes'][logits.argmax()]
            wait = f"document.getElementById('try-example').textContent.includes('{name.upper()}')"
            page.wait_for_function(wait)
            assert says in text(page, 'example')
            assert 'there the image is misclassified' in text(page, 'curve-text')
            assert ABOUT['classes'][label] in text(page, 'example')
            shown = [float(p) for p in re.findall(r'([\d.]+) %', text(page, 'bars'))]
            assert shown == pytest.approx((100 * logits.softmax(0)).tolist(), abs=0.1)
            value = margin(logits[None], LABELS[[image]]).item()
            assert f'it is {value:.1f} nats' in text(page, 'curve-text')
            assert f'size={N - 2}' in page.url and f'model={name}' in page.url
            if name == 'gfz':
                joint = f'log p(x, {says})\t{logits.max():.1f} nats'
                assert joint in text(page, 'facts'), text(page, 'facts')
                assert f'{of(ABOUT["models"][name]["wrong"])[at]:.0f} of 20' in text(page, 'facts')
                assert text(page, 'facts').count('ed, score') == 3
        before = text(page, 'bars')
        page.focus('#try-latents-attacker')
        page.keyboard.press('ArrowDown')
        page.wait_for_function("location.hash.includes('latents=fresh')")
        assert text(page, 'bars') != before and 'mean over 20 draws' in text(page, 'bars-text')
        # The sign of a mean of logits says little of the mean of probabilities
        assert 'misclassified' not in text(page, 'curve-text')
        assert 'nats, mean of 20 draws' in text(page, 'facts')
        first = text(page, 'plane-text')
        page.focus('#try-a')
        page.keyboard.press('Home')
        assert text(page, 'plane-text') != first and '-1.00 towards' in text(page, 'plane-text')
        page.click('#try-plane', position=dict(x=2, y=2))
        assert '-1.00 towards the boundary and 2.00 at random' in text(page, 'plane-text')
        link, seen = page.url, [text(page, name) for name in ('example', 'facts', 'plane-text')]
    with opened(browser, link, width) as page:
        assert [text(page, name) for name in ('example', 'facts', 'plane-text')] == seen
        page.evaluate("location.hash = 'walk-in-a-plane'")  # a heading, as the contents link it
        page.focus('#try-size')
        page.keyboard.press('Home')
        page.wait_for_function("location.hash.includes('size=0&latents=fresh')")
    with opened(browser, f'{address}/light.html#image=999&model=x&size=-1&a=1e3', width) as page:
        assert 'GFZ' in text(page, 'example')


def test_a_browser_that_writes_no_more_addresses_still_shows_the_view(browser, address):
    "As Safari for some seconds; the address follows"
    with opened(browser, f'{address}/light.html', 390) as page:
        page.evaluate(
            '() => { own = history.replaceState; history.replaceState = () => { throw Error() } }'
        )
        page.click('label[for=try-model-cnn]')
        page.wait_for_function('document.getElementById("try-example").textContent.includes("CNN")')
        assert 'model=cnn' not in page.url
        page.evaluate('() => { history.replaceState = own }')
        page.wait_for_function('location.hash.includes("model=cnn")')


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_axe_finds_nothing(browser, address, width, theme):
    "No fault of level A or AA of WCAG 2.2 that axe-core knows"
    pytest.importorskip('axe_playwright_python', reason='axe-core is not installed')
    axe = str(files('axe_playwright_python') / 'axe.min.js')
    with opened(browser, f'{address}/{theme}.html', width, color_scheme='dark') as page:
        page.add_script_tag(path=axe)
        levels = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']
        found = page.evaluate('levels => axe.run({runOnly: levels})', levels)
        headings = page.locator('h1, h2, h3').all_inner_texts()
        assert headings == ['Try it', 'Attack an image', 'Walk in a plane', 'What the data are']
        faults = [(fault['id'], fault['nodes'][0]['html']) for fault in found['violations']]
        assert not faults and len(found['passes']) > 10


def test_without_javascript_there_is_a_picture(browser, address):
    with opened(browser, f'{address}/light.html', 390, java_script_enabled=False) as page:
        picture = page.locator('noscript img')
        assert picture.get_attribute('alt') and picture.bounding_box()['width'] > 500
        assert page.evaluate('document.documentElement.scrollWidth') == 390
        assert page.locator('#try-it').is_hidden() and page.locator('#try-wait').is_hidden()


FIGURE = """<!DOCTYPE html><meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{margin: 0 12px}} {}</style><main><div class="cell-output cell-output-display"><p><a href="#">
<img class="img-fluid" width="1000" height="400" src="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>">
</a></p></div><a href="https://colab.research.google.com/x">Open in Colab</a></main>"""


def test_a_wide_figure_can_be_read_on_a_phone(browser):
    "It keeps half of its width and is moved within the page, which is as wide as the screen"
    css = '.img-fluid {max-width: 100%; height: auto}' + (NBS / 'styles.css').read_text()
    for width, least, most in ((390, 500, 600), (1280, 1000, 1000)):
        page = browser.new_page(viewport=dict(width=width, height=800))
        page.set_content(FIGURE.format(css))
        box = page.evaluate(
            '(({width, height}) => [width, height])(document.querySelector("img").getBoundingClientRect())'
        )
        assert least <= box[0] <= most and box[0] == pytest.approx(2.5 * box[1])
        assert page.evaluate('document.documentElement.scrollWidth') == width
        page.close()


def test_nothing_comes_from_elsewhere():
    for name in ('try_it.js', 'try_it.css', 'try_it.ipynb'):
        source = (NBS / name).read_text()
        links = re.findall(r'https?://[^\s"\'\\)]+', source)
        allowed = ('https://colab', 'https://github.com/genrobust', 'http://www.w3.org/2000/svg')
        assert all(link.startswith(allowed) for link in links), links
