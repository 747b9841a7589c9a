"""METEOR's tables for the tests: the published ones and small ones."""

import pytest

from metrics import meteor_data
from tests.metrics.small_tables import write_tables


@pytest.fixture(scope="session")
def tables():
    """The published tables of an installed pycocoevalcap. The first run compiles them into the user's cache."""
    tables = meteor_data.load()
    assert tables.matchers() == ["exact", "stem", "synonym", "paraphrase"], "needs an installed pycocoevalcap"
    return tables


@pytest.fixture
def small_tables(tmp_path, monkeypatch):
    """A folder of small tables, set as METEOR_DATA, with an empty cache at tmp_path/"cache"."""
    folder = write_tables(tmp_path / "tables")
    monkeypatch.setenv("METEOR_DATA", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(meteor_data, "last_loaded", {})
    return folder
