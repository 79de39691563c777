"""The methods a study may name. Adding one is its module, and one member of this union."""

from bdense_core.methods.dash import DASH
from bdense_core.methods.pd import PD
from bdense_core.methods.sfd import SFD
from bdense_core.methods.synthetic import Synthetic

AnyMethod = DASH | PD | SFD | Synthetic

__all__ = ["DASH", "PD", "SFD", "AnyMethod", "Synthetic"]
