"""Hypothesis strategies for faults and programs: what to inject, what ranks do, as plain data."""

from rpcprops.strategies.faults import (
    delay_tables,
    delays,
    fail_counts,
    fault_plans,
    fault_tables,
    message_types,
    retryable_subsets,
)
from rpcprops.strategies.groups import group_programs
from rpcprops.strategies.messages import message_faults
from rpcprops.strategies.programs import programs, programs_under_faults

__all__ = [
    "delay_tables",
    "delays",
    "fail_counts",
    "fault_plans",
    "fault_tables",
    "group_programs",
    "message_faults",
    "message_types",
    "programs",
    "programs_under_faults",
    "retryable_subsets",
]
