import matplotlib
import pytest
from under_attack import Prototypes

from genrobust.data import DataError, Splits, load, load_or_synthetic, synthetic

matplotlib.use('agg')


@pytest.fixture(scope='session')
def loaded():
    "Fashion-MNIST, or drawn images where it cannot be had, and which it is"
    return load_or_synthetic()


@pytest.fixture(scope='session')
def fashion(loaded):
    "Fashion-MNIST, where it can be had"
    name, splits = loaded
    if name != 'fashion_mnist':
        pytest.skip('Fashion-MNIST is neither on disk nor to be downloaded')
    return splits


@pytest.fixture(scope='session')
def mnist():
    try:
        return load('mnist')
    except DataError:
        pytest.skip('MNIST is neither on disk nor to be downloaded')


@pytest.fixture(scope='session')
def drawn():
    return Splits(synthetic(1500), synthetic(500, seed=1), synthetic(500, seed=2))


@pytest.fixture
def offline(drawn, monkeypatch):
    "The command gets drawn images, whatever data set it asks for"
    monkeypatch.setattr('genrobust.cli.load', lambda name, root: drawn)


@pytest.fixture(scope='session')
def garments(drawn):
    return Splits(*[part.first(n) for part, n in zip(drawn, (600, 500, 500))])


@pytest.fixture(scope='session')
def prototypes(garments):
    return Prototypes(garments.train)
