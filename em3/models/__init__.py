"""EM3 around any ranking model, and the rankers it is tried on."""

from .dcn import DCNv2
from .din import DIN
from .em3 import EM3

__all__ = ["DIN", "EM3", "DCNv2"]
