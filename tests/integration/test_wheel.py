"""The wheel, as users get it: what is in it, how large it is, and that it runs without the repository beside it."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from launching import REPOSITORY, environment

from dmagent_loader import __version__
from dmagent_loader.agent.checkpoint import IN_REPOSITORY, RECORD_FOLDER, list_bundled
from dmagent_loader.training.stages import find_record

MOST_BYTES = 9_500_000
"""Limit on the wheel's size; the weights of the agent take 7.9 MB of it."""
HAS_COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is not None
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
ADDRESS = "https://example.org/owner/name"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files, because a build leaves those of earlier builds in its folder."""
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--deduplicate"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in filter(None, files.stdout.decode().split("\0")):
        if (REPOSITORY / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(REPOSITORY / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as the README says."""
    return built_wheel(source, tmp_path_factory.mktemp("dist"))


def built_wheel(source: Path, target: Path, **variables: str) -> Path:
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", target, ".")
    run(*command, cwd=source, **variables)
    [built] = target.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; the packages that it needs are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def run(*command: str | Path, cwd: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment(**variables), capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"dmagent_loader-{__version__}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_and_what_a_run_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "dmagent_loader").rglob("*.py") if path.is_file()
    }
    checkpoints = {
        f"dmagent_loader/agent_checkpoints/{name}"
        for name in (
            "README.md",
            "dmagent-plus/README.md",
            "dmagent-plus/config.json",
            "dmagent-plus/model.safetensors",
            "dmagent-rl/README.md",
            "dmagent-rl/config.json",
            "dmagent-rl/model.safetensors",
            "topics/README.md",
            "topics/model.safetensors",
        )
    }
    inside = {name for name in names if not name.startswith(f"dmagent_loader-{__version__}.dist-info/")}
    compiled = {
        f"dmagent_loader/{name}.abi3.so"
        for name in ("mixture/_order", "mixture/_rows", "shards/_reading")
        if HAS_COMPILER
    }
    assert inside == package | checkpoints | compiled | {"dmagent_loader/py.typed"}
    assert wheel.stat().st_size < MOST_BYTES
    [pattern] = re.findall(r"dist/(dmagent_loader-\S*\.whl)", README)
    assert fnmatch.fnmatch(wheel.name, pattern)


def test_a_wheel_without_compiled_loops_fits_any_machine(source: Path, tmp_path: Path) -> None:
    wheel = built_wheel(source, tmp_path, DMAGENT_PURE_PYTHON="1")
    assert wheel.name == f"dmagent_loader-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".c", ".h"))]


def test_the_loops_are_compiled_where_python_has_a_stable_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMAGENT_PURE_PYTHON", raising=False)
    functions = runpy.run_path(str(REPOSITORY / "setup.py"))
    names = [f"dmagent_loader.{name}" for name in ("mixture._order", "mixture._rows", "shards._reading")]
    for without_lock, expected in ((0, names), (None, names), (1, [])):
        monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": without_lock}.get)
        assert [loop.name for loop in functions["compiled_loops"]()] == expected


def test_the_page_of_the_package_has_no_link_that_leads_nowhere(wheel: Path) -> None:
    found = metadata(wheel)
    page = str(found.get_payload())
    assert len(page) > 3000
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page)
    assert links
    assert {link or image for link, image in links} == {"https://arxiv.org/abs/2507.15640"}
    assert "data mixing" in str(found["Keywords"])


def test_an_address_in_setup_cfg_makes_all_links_absolute() -> None:
    functions = runpy.run_path(str(REPOSITORY / "setup.py"))
    page = functions["package_page"](README, ADDRESS)
    links = [link or image for link, image in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page)]
    assert len(links) == len(re.findall(r"\]\(|src=", README))
    for link in links:
        assert link.startswith("https://"), link
        path = re.sub(rf"^{ADDRESS}/(?:blob|raw)/HEAD/", "", link)
        assert path == "https://arxiv.org/abs/2507.15640" or (REPOSITORY / path).is_file()
    assert f'src="{ADDRESS}/raw/HEAD/docs/images/demo.png"' in page
    assert set(functions["project_urls"](ADDRESS)) == {"Source", "Documentation", "Changelog", "Issues"}


def test_the_installed_wheel_trains(installed: Path, tmp_path: Path) -> None:
    """The README's program, with the agent of the wheel."""
    [program] = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert 'policy="influence"' in program
    program = program.replace('policy="influence"', 'agent="dmagent-rl"')
    script = tmp_path / "train.py"
    script.write_text(f"{program}\nimport dmagent_loader; print(dmagent_loader.__file__)\n", encoding="utf-8")
    done = run(sys.executable, script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert str(installed / "dmagent_loader" / "__init__.py") in done.stdout
    assert re.search(r"'source/web': [1-9]\d*, 'target/math': [1-9]", done.stdout)


def test_commands_of_the_installed_wheel_say_where_the_training_record_is(installed: Path, tmp_path: Path) -> None:
    dmagent, variables = installed / "bin" / "dmagent", {"PYTHONPATH": str(installed)}
    assert "dmagent-rl: 2,125,568 parameters" in run(dmagent, "inspect", "dmagent-rl", cwd=tmp_path, **variables).stdout
    refused = run(dmagent, "inspect", "dmagent-sft", cwd=tmp_path, check=False, **variables)
    assert refused.returncode != 0
    assert f"pass the path of {RECORD_FOLDER}/dmagent-sft there" in refused.stderr
    train = (dmagent, "train-agent", "cql", "--output", "again", "--recorded")
    refused = run(*train, "recorded-math", cwd=tmp_path, check=False, **variables)
    assert refused.returncode != 0
    assert f"pass the path of {RECORD_FOLDER}/recorded-math there" in refused.stderr


def test_the_training_record_has_the_checksums_and_names_that_are_promised() -> None:
    folder = REPOSITORY / RECORD_FOLDER
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(sums) == {name for name in files if name.endswith((".json", ".safetensors"))}
    assert sums == {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in sums}
    assert set(IN_REPOSITORY) == {path.name for path in folder.iterdir() if path.is_dir()} - {"critics", "plus"}
    assert list_bundled()["dmagent-sft"] == folder / "dmagent-sft"
    assert find_record("recorded-math") == find_record(folder / "recorded-math")
