"""Early answers: reads answers with probes before sampling ends, and stops sampling at a bounded risk of error."""

from cosprobe.early_exit.prediction import predict
from cosprobe.early_exit.reader import Reader, attach
from cosprobe.early_exit.report import answer_early
from cosprobe.early_exit.threshold import Policy

__all__ = [
    "Policy",
    "Reader",
    "answer_early",
    "attach",
    "predict",
]
