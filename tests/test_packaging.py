"""What is installed is what stands in the checkout: wheels, sdists and editable installs, with the two links and without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from diffalign._links import check_links

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ("pipelines", "rewards")


def python(*args: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def build(source: Path, out: Path, *flags: str) -> Path:
    done = python("-m", "build", "--no-isolation", *flags, "--outdir", out, source, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def files(folder: Path, name: str) -> set[str]:
    """The files of `folder` as they should be called below `name`; the two links are not followed."""
    below = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    linked = {path for path in below if folder.name == "diffalign" and path.parts[0] in ADAPTERS}
    kept = {path for path in below - linked if "__pycache__" not in path.parts and not path.name.startswith(".")}
    return {f"{name}/{path.as_posix()}" for path in kept}


def wheel_of(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def unlinked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which the links are what git makes of them with `core.symlinks=false`: small text files."""
    copy = tmp_path_factory.mktemp("unlinked")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("diffalign", *ADAPTERS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ADAPTERS:
        link = copy / "diffalign" / name
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    return copy


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel made from it."""
    return build(ROOT, tmp_path_factory.mktemp("built") / "dist")


def test_wheel_has_every_file_of_the_checkout(built: Path):
    expected = files(ROOT / "diffalign", "diffalign") | {
        name for adapter in ADAPTERS for name in files(ROOT / adapter, f"diffalign/{adapter}")
    }
    names = names_in(wheel_of(built))
    assert {name for name in names if name.startswith("diffalign/")} == expected
    assert {"diffalign/rewards/__init__.py", "diffalign/pipelines/__init__.py"} <= expected
    (info,) = {name.split("/")[0] for name in names} - {"diffalign"}  # no `rewards` or `pipelines` in a user's site-packages
    assert info.endswith(".dist-info")


def test_sdist_has_the_top_level_folders_as_real_files(built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    for folder in ("diffalign", *ADAPTERS):
        assert files(ROOT / folder, folder) <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "tests/test_packaging.py"} <= names
    assert not any(name.startswith(("diffalign/rewards", "diffalign/pipelines", ".venv", "runs/")) for name in names)
    assert not any(member.issym() for member in members)


def test_every_way_of_building_gives_the_same_wheel(built: Path, unlinked: Path, tmp_path: Path):
    straight = build(ROOT, tmp_path / "straight", "--wheel")
    without_links = build(unlinked, tmp_path / "without", "--wheel")
    assert names_in(wheel_of(straight)) == names_in(wheel_of(without_links)) == names_in(wheel_of(built))


def test_metadata(built: Path):
    with zipfile.ZipFile(wheel_of(built)) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "diffalign = diffalign.cli:main" in scripts
    assert "License-Expression: Apache-2.0" in metadata
    assert "torchvision" not in metadata.split("\n\n")[0]  # an unloadable one breaks nearly all of transformers


def test_import_from_an_installed_wheel(built: Path, tmp_path: Path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", target)
    done = python(*pip, wheel_of(built), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = "import diffalign.rewards as r, diffalign.pipelines as p; print(r.__file__); print(p.__file__)"
    done = python("-c", code, cwd=elsewhere, path=target)
    assert done.stdout.split() == [str(target / "diffalign" / name / "__init__.py") for name in reversed(ADAPTERS)], done.stderr


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_import_from_the_editable_install(where: str, tmp_path: Path):
    code = "import sys, diffalign.rewards as r, diffalign.pipelines as p; print(r.__file__, p.__file__, 'torch' in sys.modules)"
    done = python("-c", code, cwd=ROOT if where == "root" else tmp_path)
    expected = [str(ROOT / "diffalign" / name / "__init__.py") for name in reversed(ADAPTERS)]
    assert done.stdout.split() == [*expected, "False"], done.stderr


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_generic_name_is_refused(name: str):
    done = python("-c", f"import {name}", cwd=ROOT)
    assert done.returncode != 0
    assert f"import diffalign.{name} instead" in done.stderr


def test_a_checkout_without_links_says_how_to_mend_it(unlinked: Path):
    done = python("-c", "import diffalign", cwd=unlinked)
    assert done.returncode != 0
    assert "diffalign/pipelines and diffalign/rewards should link to" in done.stderr.splitlines()[-3]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_mend_mends(tmp_path: Path):
    def git(*args: str, cwd: Path) -> None:
        env = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *identity, *args], cwd=cwd, env=env, check=True, capture_output=True)

    origin = tmp_path / "origin"
    for name in ADAPTERS:
        (origin / name).mkdir(parents=True)
        (origin / name / "__init__.py").touch()
    (origin / "diffalign").mkdir()
    for name in ADAPTERS:
        (origin / "diffalign" / name).symlink_to(f"../{name}")
    git("init", "-q", cwd=origin)
    git("add", ".", cwd=origin)
    git("commit", "-q", "-m", "links", cwd=origin)
    git("-c", "core.symlinks=false", "clone", "-q", "-c", "core.symlinks=false", str(origin), "clone", cwd=tmp_path)

    package = tmp_path / "clone" / "diffalign"
    with pytest.raises(ImportError) as error:
        check_links(str(package))
    (mend,) = (line for line in str(error.value).splitlines() if line.strip().startswith("git "))
    subprocess.run(mend, shell=True, cwd=package.parent, check=True, capture_output=True)
    check_links(str(package))
