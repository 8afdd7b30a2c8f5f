"""The benchmark: what it runs really runs, and its figures are of what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rpcprops.bench import Bench, failing, long_program, small_program
from rpcprops.oracle import predict
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner


def test_the_small_program_meets_every_failing_type() -> None:
    """All four retryable types fire in the program that the headline figures are about."""
    prediction = predict(small_program(), failing(3))
    struck = {message for by_type in prediction.failures() for message in by_type}
    assert struck == set(failing(3).default.messages_to_fail)


def test_long_programs_have_their_length() -> None:
    """Growth with length is growth with that many steps."""
    assert [len(long_program(n).steps) for n in (1, 4, 16, 64)] == [1, 4, 16, 64]


def test_samples_and_the_floor(rpc_cluster: ClusterFactory) -> None:
    """An example is right and dearer than the bare floor of the same ranks."""
    bench = Bench(Runner(rpc_cluster.server), 2, lambda _: None)
    (sample,) = bench.alternate([("faultless", small_program(), failing(0), bench.rate)])
    (shortest,) = bench.alternate([("short", long_program(1), failing(0), bench.rate)])
    floor = bench.floor(4)
    assert sample.wrong == shortest.wrong == 0
    assert floor.seconds.least > 0
    assert 0 < floor.processor.least < sample.processor.greatest


def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    """`rpcprops bench` without PyTorch's harness ends with 0, prints ratios, and writes JSON."""
    command = [sys.executable, "-m", "rpcprops", "bench", "--repeats", "1", "--harness", "0"]
    ran = subprocess.run(
        [*command, "--json", "figures.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "fast against real time" in ran.stdout
    data = json.loads((tmp_path / "figures.json").read_text())
    names = {sample["name"] for sample in data["comparison"]["samples"]}
    assert "ours, real time" in names
    assert data["comparison"]["ratios"]["fast against real time"] > 5
