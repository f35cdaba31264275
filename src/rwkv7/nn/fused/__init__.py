"""What stands beside the recurrence, each as one Triton launch each way on a GPU.

Every function has a twin in plain torch that runs everywhere else and says what is computed; the
kernels compute in float32 and round once.
"""

from .activation import squared_relu
from .keys import key_operands
from .launch import use_fused
from .output import gated_output
from .shift import mix, shifted_mixes

__all__ = ["gated_output", "key_operands", "mix", "shifted_mixes", "squared_relu", "use_fused"]
