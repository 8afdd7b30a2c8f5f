"""What the source of a test of PyTorch's says of it."""

# ruff: noqa: PT009  (PyTorch's tests are unittest's)

from __future__ import annotations

import time
import unittest
from collections.abc import Callable
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest

from rpcprops.upstream import _rules

#: Its names are only read.
rpc: Any = SimpleNamespace()
HOME = "torch.testing._internal.somewhere"


def at_home(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as if it were PyTorch's test code."""
    function.__module__ = HOME
    return function


@at_home
def quick_helper(case: unittest.TestCase) -> None:
    began = time.monotonic()
    case.assertLess(time.monotonic() - began, 3)


@at_home
def patient_helper(timeout: float = 20) -> bool:
    began = time.time()
    while time.time() - began < timeout:
        pass
    return True


def foreign_helper() -> None:
    assert time.time() > 0


class Suite(unittest.TestCase):
    __test__ = False  # its tests are read, not run

    @at_home
    def test_bounds_its_time(self) -> None:
        tik = time.time()
        tok = time.time()
        self.assertTrue(tok - tik < 5)

    @at_home
    def test_bounds_its_time_in_a_helper(self) -> None:
        quick_helper(self)

    @at_home
    def test_bounds_its_time_in_a_method(self) -> None:
        self._bound()

    @at_home
    def _bound(self) -> None:
        assert time.perf_counter() < 1e9

    @at_home
    def test_bounds_what_it_computed(self) -> None:
        began = perf_counter()
        ended = perf_counter()
        took = ended - began
        self.assertLess(took, 5)

    @at_home
    def test_prints_its_time(self) -> None:
        tik = time.time()
        self.assertEqual(1, 1)
        print(time.time() - tik)

    @at_home
    def test_waits(self) -> None:
        self.assertTrue(patient_helper())

    @at_home
    def test_calls_what_is_not_pytorchs(self) -> None:
        foreign_helper()

    @at_home
    def test_names_a_backend(self) -> None:
        self.assertEqual(self._backend(), rpc.backend_registry.BackendType.OTHER)

    @at_home
    def _backend(self) -> Any:
        return None

    @at_home
    def test_names_options_in_a_method(self) -> None:
        self._options()

    @at_home
    def _options(self) -> Any:
        return rpc.TensorPipeRpcBackendOptions()

    @at_home
    def test_has_no_time(self) -> None:
        self.assertEqual(1, 1)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("test_bounds_its_time", "Suite.test_bounds_its_time"),
        ("test_bounds_what_it_computed", "Suite.test_bounds_what_it_computed"),
        ("test_bounds_its_time_in_a_helper", "quick_helper"),
        ("test_bounds_its_time_in_a_method", "Suite._bound"),
    ],
)
def test_an_assertion_on_elapsed_time_is_found(name: str, place: str) -> None:
    """A test that bounds how long something took runs in real time, wherever the bound stands."""
    assert _rules.asserts_wall_clock(Suite, name) == f"{place} asserts how long something took"


@pytest.mark.parametrize(
    "name", ["test_prints_its_time", "test_calls_what_is_not_pytorchs", "test_has_no_time"]
)
def test_time_that_is_not_asserted_is_no_reason(name: str) -> None:
    """A clock that is only read, or read by code that is not PyTorch's, changes nothing."""
    assert _rules.asserts_wall_clock(Suite, name) == ""


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("names_a_backend", ("OTHER", "Suite.test_names_a_backend names BackendType.OTHER")),
        (
            "names_options_in_a_method",
            ("TENSORPIPE", "Suite._options names TensorPipeRpcBackendOptions"),
        ),
        ("has_no_time", ("", "")),
    ],
)
def test_an_agent_that_is_asked_for_is_found(name: str, asked: tuple[str, str]) -> None:
    """A test asks for an agent where it, or a helper, names its backend or its options."""
    assert _rules.asks_for_agent(Suite, f"test_{name}") == asked


def test_timeouts_are_found() -> None:
    """A test whose helpers have a timeout gets no delays; one without may get them."""
    assert _rules.has_timeouts(Suite, "test_waits") == "patient_helper has timeout"
    assert _rules.has_timeouts(Suite, "test_prints_its_time") == ""


@pytest.mark.parametrize("agent", ["tensorpipe", "faulty"])
def test_suites_of_an_agent_run_without_drawn_tables(agent: str) -> None:
    """Suites about the agent itself bring their own options, and say why they are left out."""
    assert "its own options" in _rules.means_nothing_under_faults(agent, Suite, "test_waits")
    assert _rules.means_nothing_under_faults("generic", Suite, "test_has_no_time") == ""
