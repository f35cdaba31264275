"""Training on text: `train_model` and `tune_model` begin a run, `resume_training` goes on."""

from .evaluate import Evaluation, evaluate
from .loop import TrainingDivergedError, TrainResult
from .runs import plan_training, resume_training, train_model, tune_model
from .settings import TrainSettings
from .watch.report import Report, console_report

__all__ = [
    "Evaluation",
    "Report",
    "TrainResult",
    "TrainSettings",
    "TrainingDivergedError",
    "console_report",
    "evaluate",
    "plan_training",
    "resume_training",
    "train_model",
    "tune_model",
]
