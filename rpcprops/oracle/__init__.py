"""The oracle: predicts what a program must show under a plan, and judges what a run showed."""

from rpcprops.oracle._account import FaultCount, account, fired, fired_by_type
from rpcprops.oracle._chosen import chosen, predict_for, predict_in
from rpcprops.oracle._documented import DOCUMENTED, Accepted, Documented, accepted, accepted_json
from rpcprops.oracle._findings import are_kept, seconds_in_vain, set_apart
from rpcprops.oracle._judge import judge
from rpcprops.oracle._meeting import meeting
from rpcprops.oracle._messages import lost_seconds
from rpcprops.oracle._predict import predict
from rpcprops.oracle._unpredicted import endless_wait, judge_unpredicted
from rpcprops.oracle.errors import error_class, is_expected
from rpcprops.oracle.model import Model
from rpcprops.oracle.prediction import ErrorClass, Met, Prediction, Send, StepPrediction
from rpcprops.torch_facts import FINDINGS, Finding

__all__ = [
    "DOCUMENTED",
    "FINDINGS",
    "Accepted",
    "Documented",
    "ErrorClass",
    "FaultCount",
    "Finding",
    "Met",
    "Model",
    "Prediction",
    "Send",
    "StepPrediction",
    "accepted",
    "accepted_json",
    "account",
    "are_kept",
    "chosen",
    "endless_wait",
    "error_class",
    "fired",
    "fired_by_type",
    "is_expected",
    "judge",
    "judge_unpredicted",
    "lost_seconds",
    "meeting",
    "predict",
    "predict_for",
    "predict_in",
    "seconds_in_vain",
    "set_apart",
]
