"""places and children: a checkout and an installed package each find their own."""

import os
import pathlib
import sys

import pytest

from qkjax.cli import children, config_flag, places

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def installed(tmp_path, monkeypatch) -> pathlib.Path:
    """As if this package lay in a site-packages folder; its folder there."""
    package = tmp_path / "site-packages" / "qkjax"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "muon_noqk.py").touch()
    monkeypatch.setattr(places, "PACKAGE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package


def test_a_checkout_keeps_its_corpus_and_its_children(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert (places.checkout(), places.configs()) == (ROOT, ROOT / "configs")
    assert places.data() == ROOT / "data"
    path = children.environment()["PYTHONPATH"]
    assert path == f"{ROOT}{os.pathsep}elsewhere"
    start = [sys.executable, "-P", "-m", "qkjax.commands"]
    assert children.command("train", "--workdir=a") == [*start, "train", "--workdir=a"]


def test_an_installed_package_uses_the_users_cache_and_its_own_configs(installed, tmp_path):
    assert (places.checkout(), places.configs()) == (None, installed / "configs")
    assert places.data() == tmp_path / "cache" / "qkjax" / "data"
    assert children.environment() == dict(os.environ)


@pytest.mark.parametrize("name", ["muon_noqk", "muon_noqk.py", "configs/muon_noqk.py"])
def test_a_config_that_comes_with_the_package_is_found_by_name(
    installed, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    assert config_flag.find(name) == installed / "configs" / "muon_noqk.py"
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.touch()
    assert config_flag.find(name) == pathlib.Path(name)  # the user's own file comes first
