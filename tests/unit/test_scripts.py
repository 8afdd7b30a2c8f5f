"""Scripts that are imported as modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rpcprops import load_script
from rpcprops.errors import UsageError


def test_a_script_is_imported_once_with_its_arguments(tmp_path: Path) -> None:
    """It sees its arguments and its neighbours, under a name of its own; its main does not run."""
    before = list(sys.argv)
    for folder in ("left", "right"):
        (tmp_path / folder).mkdir()
        text = f"import sys, beside_{folder}\nargv = sys.argv\nif __name__ == '__main__': 1 / 0\n"
        (tmp_path / folder / "main.py").write_text(text)
        (tmp_path / folder / f"beside_{folder}.py").write_text("")
    left = load_script(tmp_path / "left" / "main.py", "--size", "2")
    right = load_script(str(tmp_path / "right" / "main.py"))
    assert (left.__name__, right.__name__) == ("left_main", "right_main")
    assert left.argv == [str(tmp_path / "left" / "main.py"), "--size", "2"]
    assert sys.argv == before
    assert load_script(tmp_path / "left" / "main.py") is left
    (tmp_path / "again" / "left").mkdir(parents=True)
    (tmp_path / "again" / "left" / "main.py").write_text("")
    with pytest.raises(UsageError, match=r"would be the module left_main.*rename a folder"):
        load_script(tmp_path / "again" / "left" / "main.py")


def test_a_script_that_cannot_be_imported(tmp_path: Path) -> None:
    """No file, and a script that exits, are told of; nothing of it stays."""
    with pytest.raises(UsageError, match="must be the path of a Python file that is there"):
        load_script(tmp_path / "none.py")
    (tmp_path / "stops.py").write_text("import sys\nsys.exit(2)\n")
    with pytest.raises(UsageError, match="exits with 2 while it is imported"):
        load_script(tmp_path / "stops.py")
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_script(tmp_path / "breaks.py")
    assert not [name for name in sys.modules if name.endswith(("_stops", "_breaks"))]
