import matplotlib
import pytest

from genrobust.data import load, load_or_synthetic

matplotlib.use('agg')


@pytest.fixture(scope='session')
def fashion():
    "Fashion-MNIST, where it can be had"
    name, splits = load_or_synthetic()
    if name != 'fashion_mnist':
        pytest.skip('Fashion-MNIST is neither on disk nor to be downloaded')
    return splits


@pytest.fixture(scope='session')
def drawn():
    return load('synthetic')
