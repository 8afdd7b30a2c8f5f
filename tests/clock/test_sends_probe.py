"""Whether sends of torch's agent can be seen: that depends on how a build of torch calls them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.clock.conftest import CHILD_SECONDS, RunPython

#: The five functions of torch, in the order of ``_sends.c``, and the vtable of its agent. The
#: wheels for CUDA call the first one through the vtable alone.
SOURCE = """
#define NAMED(name) __asm__(name)
void faulty_send(void) NAMED("{0}");
void base_send(void) NAMED("{1}");
void should_fail(void) NAMED("{2}");
void delay_of(void) NAMED("{3}");
void payload(void) NAMED("{4}");
void faulty_send(void) {{ base_send(); should_fail(); }}
void base_send(void) {{ delay_of(); }}
void should_fail(void) {{ }}
void delay_of(void) {{ }}
void payload(void) {{ }}
extern void *const vtable[4] NAMED("_ZTVN5torch11distributed3rpc21FaultyTensorPipeAgentE");
void *const vtable[4] = {{ 0, 0, payload, {slot} }};
"""
NAMES = """
import ctypes
library = ctypes.CDLL(None)
library.rpcprops_sends_name.restype = ctypes.c_char_p
print(*[library.rpcprops_sends_name(index).decode() for index in range(5)])
"""
PROBE = """
import ctypes, sys
from rpcprops.clock import sends
ctypes.CDLL(sys.argv[1])
print(sends.problem())
"""


@pytest.mark.parametrize(
    ("slot", "options", "unseen"),
    [
        ("faulty_send", (), None),
        ("payload", (), 0),
        ("faulty_send", ("-Wl,-Bsymbolic",), 0),
    ],
    ids=["by-vtable", "in-no-vtable", "bound-by-the-linker"],
)
def test_what_a_build_of_torch_calls(
    run_python: RunPython,
    compiler: str,
    tmp_path: Path,
    slot: str,
    options: tuple[str, ...],
    unseen: int | None,
) -> None:
    """A send is seen if the vtable of the loaded library leads to ours, not where it cannot."""
    names = run_python(NAMES).split()
    source, library = tmp_path / "torch.c", tmp_path / "libtorch_cpu.so"
    source.write_text(SOURCE.format(*names, slot=slot), encoding="utf-8")
    flags = ["-std=c11", "-O1", "-shared", "-fPIC", "-Wl,-soname,libtorch_cpu.so", *options]
    subprocess.run(
        [compiler, *flags, str(source), "-o", str(library)], check=True, timeout=CHILD_SECONDS
    )
    said = run_python(PROBE, library).strip()
    if unseen is None:
        assert said == ""
    else:
        assert f"does not call {names[unseen]} in a way that can be seen" in said
