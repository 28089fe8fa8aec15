"""Attacks on any classifier from images to logits."""
from .result import *
from .autodiff import *
from .inputs import *
from .engine import *
from .pairs import *
from .core import *
from .gradient import *
from .boundary import *
from .penalty import *
from .sphere import *
from .lagrangian import *
from .projection import *
from .zeroth_order import *
from .score_based import *
from .decision_based import *
