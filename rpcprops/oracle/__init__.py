"""The oracle: predicts what a program must show under a plan, and judges what it showed."""

from rpcprops.oracle._account import FaultCount, account, fired, fired_by_type
from rpcprops.oracle._judge import judge
from rpcprops.oracle._ladder import is_decided, rungs
from rpcprops.oracle._model import Prediction, Send, StepPrediction, predict

__all__ = [
    "FaultCount",
    "Prediction",
    "Send",
    "StepPrediction",
    "account",
    "fired",
    "fired_by_type",
    "is_decided",
    "judge",
    "predict",
    "rungs",
]
