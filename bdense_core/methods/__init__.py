"""The methods a study may name. Adding one is its module, and one member of this union."""

from bdense_core.methods.sfd import SFD
from bdense_core.methods.synthetic import Synthetic

AnyMethod = SFD | Synthetic

__all__ = ["SFD", "AnyMethod", "Synthetic"]
