"""Hypothesis strategies for faults: what to inject, drawn as plain data."""

from rpcprops.strategies.faults import (
    delay_tables,
    delays,
    fail_counts,
    fault_plans,
    fault_tables,
    message_types,
    retryable_subsets,
)

__all__ = [
    "delay_tables",
    "delays",
    "fail_counts",
    "fault_plans",
    "fault_tables",
    "message_types",
    "retryable_subsets",
]
