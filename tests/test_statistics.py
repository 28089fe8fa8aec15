"Rates, intervals and tests of values that belong to the same images, and of what is none."

import numpy as np
import pandas as pd
import pytest
import torch

from genrobust.statistics import Rate, clustered, design_effect, mcnemar


def test_values_of_other_images_are_refused_and_not_aligned():
    kept, lost = pd.Series([True] * 8), pd.Series([False] * 8)
    assert mcnemar(kept, lost) == mcnemar(kept[::-1], lost.to_numpy()) == (8, 0, 2 * 0.5**8)
    seeds = pd.Series([0, 0, 0, 0, 1, 1, 1, 1])
    hits = seeds.astype(float)
    assert clustered(hits, seeds)[0] < 0.05 and design_effect(hits, seeds) > 1
    for measure, one, other in (
        (mcnemar, kept, lost.set_axis(range(8, 16))),
        (mcnemar, kept, lost[::-1]),
        (mcnemar, kept, lost[:7]),
        (clustered, hits, seeds.set_axis(range(8, 16))),
        (design_effect, hits, seeds[:7]),
        (Rate.of, hits, seeds[::-1]),
    ):
        with pytest.raises(ValueError, match='two values of each image, with the same index'):
            measure(one, other)


def test_a_rate_is_of_numbers_from_0_to_1():
    assert Rate.of(torch.tensor([1.0, 0.0, 0.5])).n == 3
    for bad in ([np.nan, 1, 0], [2, 0], [-1, 0]):
        with pytest.raises(ValueError, match='values from 0 to 1'):
            Rate.of(bad)
    with pytest.raises(ValueError, match='two values of each image'):
        Rate.of([1, 0, 1], [0, 1])


def test_what_is_no_cluster_and_no_outcome_is_refused():
    hits = pd.Series([1.0, 1, 0, 0])
    for none in (np.nan, None):
        with pytest.raises(ValueError, match='found none for 1'):
            clustered(hits, pd.Series([0, 0, 1, none]))
    assert mcnemar([1, 0, 1, 1], hits < -1) == mcnemar([1, 0, 1, 1], [0] * 4) == (3, 0, 0.25)
    with pytest.raises(ValueError, match='true or false'):
        mcnemar([3, 1, 2], [1, 2, 2])  # predictions


def test_clustered_refuses_nan():
    hits = pd.Series([1.0, 0.0, np.nan, 1.0])
    with pytest.raises(ValueError, match='1 NaN'):
        clustered(hits, pd.Series([0, 0, 1, 1]))
