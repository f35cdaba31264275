"""What stands beside the recurrence, each as one Triton launch each way on a GPU.

Every function has a twin in plain torch that runs everywhere else and says what is computed; the
kernels compute in float32 and round once.
"""

from .activation import squared_relu
from .keys import key_operands
from .launch import use_fused
from .logits import IGNORED, loss_to_gradient_
from .output import gated_output
from .rows import Stream, channel_mix_of_rows_, time_mix_of_rows_
from .shift import Shifted, shifted_mixes
from .single import (
    ChannelMixWeights,
    Norm,
    TimeMixWeights,
    channel_mix_of_one_,
    runs_layers,
    time_mix_of_one_,
)
from .step import (
    Projections,
    StepParameters,
    mixed_in_pool_,
    runs_fused_step,
    time_mix_step_,
)
from .value import mixed_value

__all__ = [
    "IGNORED",
    "ChannelMixWeights",
    "Norm",
    "Projections",
    "Shifted",
    "StepParameters",
    "Stream",
    "TimeMixWeights",
    "channel_mix_of_one_",
    "channel_mix_of_rows_",
    "gated_output",
    "key_operands",
    "loss_to_gradient_",
    "mixed_in_pool_",
    "mixed_value",
    "runs_fused_step",
    "runs_layers",
    "shifted_mixes",
    "squared_relu",
    "time_mix_of_one_",
    "time_mix_of_rows_",
    "time_mix_step_",
    "use_fused",
]
