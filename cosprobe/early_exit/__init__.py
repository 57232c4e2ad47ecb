"""Answers before the video is finished, and when to stop, at a stated risk."""

from cosprobe.early_exit.calibrate import EarlyConfig
from cosprobe.early_exit.policy import Policy
from cosprobe.early_exit.prediction import PredictConfig, predict
from cosprobe.early_exit.reader import Reader, attach
from cosprobe.early_exit.report import answer_early

__all__ = [
    "EarlyConfig",
    "Policy",
    "PredictConfig",
    "Reader",
    "answer_early",
    "attach",
    "predict",
]
