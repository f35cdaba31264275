"""The model's modules. Users need `RWKV7` alone; the rest is for those who build on it."""

from .channel_mix import ChannelMix
from .init import initialise_
from .model import RECOMPUTE, RWKV7, Block, parameter_count
from .time_mix import TimeMix

__all__ = [
    "RECOMPUTE",
    "RWKV7",
    "Block",
    "ChannelMix",
    "TimeMix",
    "initialise_",
    "parameter_count",
]
