"""Whether the numbers are right on this machine: the experiment behind `rwkv7 verify`."""

from .checks import Check, Refusal, Row, Sizes, backend_checks
from .peers import PEERS, peer_checks

__all__ = ["PEERS", "Check", "Refusal", "Row", "Sizes", "backend_checks", "peer_checks"]
