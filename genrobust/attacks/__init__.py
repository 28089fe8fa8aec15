"""Attacks on any classifier from images to logits."""
from .core import *
from .gradient import *
from .boundary import *
from .penalty import *
from .query import *
