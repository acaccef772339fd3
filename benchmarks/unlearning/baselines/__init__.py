"""The strongest relatives of the bi-level step, each from its paper's equations: one module a method.

They take ``step(forget, retain)`` as BLUR does, with the weight ``gamma`` of the forget gradient as what is tuned.
"""

from .dampening import Dampening
from .dual_moments import DualMoments
from .forget_gain import ForgetGain
from .primal_dual import PrimalDual
from .retain_normal import RetainNormal

__all__ = ["Dampening", "DualMoments", "ForgetGain", "PrimalDual", "RetainNormal"]
