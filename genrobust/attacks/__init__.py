"""Attacks on any classifier from images to logits."""
from .result import *
from .autodiff import *
from .engine import *
from .core import *
from .gradient import *
from .boundary import *
from .penalty import *
from .projection import *
from .zeroth_order import *
from .score_based import *
from .decision_based import *
