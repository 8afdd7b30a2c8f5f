"""User modules in ranks: which are described, and how they load under their own names."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import pytest

from rpcprops import strategies
from rpcprops.cluster.finder import ModuleMap, describe_modules, install, is_user_file


def described(name: str, **attributes: Any) -> ModuleMap:
    """The map of this process with one more module in it."""
    module = types.ModuleType(name)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    sys.modules[name] = module
    try:
        return describe_modules([name])
    finally:
        del sys.modules[name]


def test_the_standard_library_and_what_is_installed_are_left_out() -> None:
    """Only files of the user's own are described, never a library's and never rpcprops itself."""
    installed = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
    names = {name for name, _ in describe_modules([]).files}
    roots = {name.partition(".")[0] for name in names}
    assert not roots & {"os", "json", "importlib", "pytest", "_pytest", "hypothesis", "rpcprops"}
    for _, file in describe_modules([]).files:
        assert not any(file.startswith(path + os.sep) for path in installed)
        assert file.endswith(".py")


def test_this_module_is_described() -> None:
    """A test module is found under the name that pytest gave it, with its own file."""
    modules = describe_modules([__name__])
    assert dict(modules.files)[__name__] == os.path.abspath(__file__)
    assert modules.first == (__name__,)
    assert __name__ not in modules.packages


def test_the_process_is_described_too() -> None:
    """Ranks get this process's path and directory, so that late imports find the same files."""
    modules = describe_modules([])
    assert modules.path == tuple(sys.path)
    assert modules.directory == os.getcwd()


def test_a_package_is_told_from_a_module(tmp_path: Path) -> None:
    """What has a path of its own is a package, whatever its file is called."""
    file = str(tmp_path / "__init__.py")
    package = described("made_up_package", __file__=file, __path__=[str(tmp_path)])
    assert "made_up_package" in package.packages
    module = described("made_up_module", __file__=file)
    assert "made_up_module" not in module.packages


@pytest.mark.parametrize("file", [None, "", "module.so", "frozen", 7])
def test_what_has_no_source_is_left_out(file: Any) -> None:
    """Built-in, compiled and made-up modules have no Python file to load, and are no error."""
    modules = (
        described("made_up_module", __file__=file) if file != 7 else described("made_up_module")
    )
    assert "made_up_module" not in dict(modules.files)
    assert modules.first == ()


def test_only_known_modules_come_first() -> None:
    """A name that is no user module is not imported by the ranks."""
    assert describe_modules(["json", "no_such_module", "", __name__]).first == (__name__,)


def test_user_files_are_told_from_installed_ones(tmp_path: Path) -> None:
    """A link into the standard library is the library's; a source elsewhere is the user's."""
    assert is_user_file(__file__)
    assert is_user_file(str(tmp_path / "mine.py"))
    assert not is_user_file(json.__file__)
    assert not is_user_file(pytest.__file__)
    # In a checkout, the folder of these is a link.
    assert not is_user_file(strategies.__file__)
    link = tmp_path / "link.py"
    link.symlink_to(json.__file__)
    assert not is_user_file(str(link))
    beside = Path(sysconfig.get_path("scripts") + "-of-mine") / "mine.py"
    assert is_user_file(str(beside))


def write(folder: Path, files: dict[str, str]) -> None:
    """Files with their folders."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run_with(modules: ModuleMap, code: str) -> Any:
    """What `code` prints, as JSON, in a fresh process that has installed the map."""
    text = (
        f"import json, sys\nfrom rpcprops.cluster import finder\n"
        f"from rpcprops.cluster.finder import ModuleMap\n"
        f"modules = {modules!r}\nfinder.install(modules)\nfinder.import_first(modules)\n{code}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_modules_load_under_their_own_names(tmp_path: Path) -> None:
    """A module, a package with a module, and one below folders that are no packages all load.

    None of them is on the path. A package's and a folder's other modules, which nobody had imported
    before, load as well.
    """
    write(
        tmp_path,
        {
            "one.py": "import two\nname = __name__",
            "second/two.py": "import pack.part\nname = __name__",
            "pack/__init__.py": "from pack import part\nname = __name__",
            "pack/part.py": "name = __name__",
            "pack/late.py": "name = __name__",
            "folder/below/test_it.py": "import folder.below.test_it as me\nname = __name__",
            "folder/below/late.py": "name = __name__",
            "folder/late.py": "name = __name__",
        },
    )
    modules = ModuleMap(
        path=tuple(sys.path),
        files=(
            ("folder.below.test_it", str(tmp_path / "folder/below/test_it.py")),
            ("one", str(tmp_path / "one.py")),
            ("pack", str(tmp_path / "pack/__init__.py")),
            ("pack.part", str(tmp_path / "pack/part.py")),
            ("two", str(tmp_path / "second/two.py")),
        ),
        packages=frozenset({"pack"}),
        first=("one", "folder.below.test_it"),
        directory=str(tmp_path),
    )
    code = """
import importlib, os
imported = [name for name in sys.modules if hasattr(sys.modules[name], "name")]
late = ["pack.late", "folder.below.late", "folder.late"]
print(json.dumps({
    "imported": sorted(set(imported) & {"one", "two", "pack", "pack.part", "folder.below.test_it"}),
    "names": [importlib.import_module(name).name for name in ["one", "two", "pack", *late]],
    "files": [sys.modules["two"].__file__, sys.modules["folder.below.test_it"].__file__],
    "directory": os.getcwd(),
}))
"""
    seen = run_with(modules, code)
    assert seen["imported"] == ["folder.below.test_it", "one", "pack", "pack.part", "two"]
    assert seen["names"] == ["one", "two", "pack", "pack.late", "folder.below.late", "folder.late"]
    assert seen["files"] == [
        str(tmp_path / "second/two.py"),
        str(tmp_path / "folder/below/test_it.py"),
    ]
    assert os.path.realpath(seen["directory"]) == os.path.realpath(tmp_path)


def test_a_script_loads_with_its_guarded_part_shut(tmp_path: Path) -> None:
    """A user's ``__main__`` is imported under its alias, and does not run as a script again."""
    script = tmp_path / "script.py"
    script.write_text("seen = [__name__]\nif __name__ == '__main__':\n    seen.append('ran')\n")
    modules = ModuleMap(path=tuple(sys.path), main=str(script), first=("__main__",))
    code = """
import __main__
print(json.dumps([__main__.seen, sys.modules["__mp_main__"] is sys.modules["__main__"]]))
"""
    assert run_with(modules, code) == [["__mp_main__"], True]


def test_a_module_of_the_users_wins_over_one_on_the_path(tmp_path: Path) -> None:
    """Two files of one name: ranks load the one that the test process had."""
    write(tmp_path, {"mine/same.py": "which = 'mine'", "other/same.py": "which = 'other'"})
    modules = ModuleMap(
        path=(str(tmp_path / "other"), *sys.path),
        files=(("same", str(tmp_path / "mine/same.py")),),
    )
    assert run_with(modules, "import same\nprint(json.dumps(same.which))") == "mine"


def test_what_nobody_described_is_not_found(tmp_path: Path) -> None:
    """A name that neither the map nor the path knows is an ordinary ModuleNotFoundError."""
    modules = ModuleMap(path=tuple(sys.path), files=(("a.b", str(tmp_path / "a/b.py")),))
    code = """
found = []
for name in ("a.c", "c", "a.b.d"):
    try:
        __import__(name)
    except ImportError as error:
        found.append(type(error).__name__)
    except OSError as error:
        found.append(type(error).__name__)
print(json.dumps(found))
"""
    assert run_with(modules, code)[:2] == ["ModuleNotFoundError"] * 2


def test_the_finder_is_not_left_in_this_process() -> None:
    """Describing modules changes nothing about how this process imports."""
    before = list(sys.meta_path)
    describe_modules([__name__])
    assert sys.meta_path == before
    assert importlib.import_module(__name__) is sys.modules[__name__]


def test_a_folder_that_torch_writes_modules_to_stays_importable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before torch 2.10 the modules of RemoteModule lie in a folder that torch appends itself."""
    before = (list(sys.path), list(sys.argv), list(sys.meta_path), os.getcwd())
    fake = types.ModuleType("torch.distributed.nn.jit.instantiator")
    fake.INSTANTIATED_TEMPLATE_DIR_PATH = "torchs-own"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    try:
        install(ModuleMap(path=("mine",)))
        assert sys.path == ["mine", "torchs-own"]
    finally:
        sys.path[:], sys.argv[:], sys.meta_path[:] = before[:3]
        os.chdir(before[3])


def test_a_module_that_starts_ranks_on_import_is_told(tmp_path: Path) -> None:
    """Ranks import it too: the error names the file and the guard of multiprocessing."""
    file = tmp_path / "unguarded.py"
    file.write_text("from rpcprops import ClusterServer\nClusterServer().start()\n")
    code = (
        "from rpcprops.cluster import finder\n"
        f"modules = finder.ModuleMap(main={str(file)!r}, first=('__main__',))\n"
        "try:\n"
        "    finder.import_first(modules)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "finder.check_not_importing()\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert not said.stderr
    assert f"{file} starts ranks while it is imported" in said.stdout
    assert "if __name__ == '__main__':" in said.stdout
