"""The job's secret: where it comes from, and that it is never shown."""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress

import pytest

import packedcomm
from packedcomm import Session, Settings, generate_secret
from packedcomm.cli.main import main
from packedcomm.errors import ArgumentError, AuthenticationError

SECRET = "correct horse battery staple"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


def test_generated_secrets_differ_and_are_long_enough():
    made = {generate_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(len(secret) == 43 and secret.isascii() for secret in made)


def test_the_secret_comes_from_its_variable():
    assert Settings.from_environment({"PACKEDCOMM_SECRET": SECRET}).secret == SECRET
    assert Settings.from_environment({}).secret == ""


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_secret_comes_from_its_file_without_the_newline(file, ending, caplog):
    file.write_bytes(SECRET.encode() + ending.encode())
    settings = Settings.from_environment({"PACKEDCOMM_SECRET_FILE": str(file)})
    assert (settings.secret, settings.secret_file) == (SECRET, str(file))
    assert not caplog.records


def test_spaces_and_further_lines_are_part_of_the_secret(file):
    file.write_text(f" {SECRET}\n\n")
    settings = Settings.from_environment({"PACKEDCOMM_SECRET_FILE": str(file)})
    assert settings.secret == f" {SECRET}\n"


def test_a_secret_given_in_code_wins_over_the_file(file):
    assert Settings(secret=SECRET, secret_file="elsewhere").secret == SECRET


def test_a_file_given_in_code_alone_is_refused_since_nothing_would_read_it(file):
    with pytest.raises(ArgumentError, match="read by Settings.from_environment only"):
        Settings(secret_file=str(file))


def test_a_secret_that_is_no_text_is_refused_without_being_shown():
    with pytest.raises(ArgumentError, match="must be text, not bytes") as raised:
        Settings(secret=SECRET.encode())
    assert SECRET not in str(raised.value)


def test_variable_and_file_together_are_refused(file):
    environ = {"PACKEDCOMM_SECRET": SECRET, "PACKEDCOMM_SECRET_FILE": str(file)}
    with pytest.raises(ArgumentError, match="both set") as raised:
        Settings.from_environment(environ)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("variable", ["PACKEDCOMM_SECRET", "PACKEDCOMM_SECRET_FILE"])
def test_an_empty_variable_is_refused_by_name(variable):
    with pytest.raises(ArgumentError, match=f"{variable} is set, but empty"):
        Settings.from_environment({variable: ""})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (SECRET.encode() + b"\xff", "isn't UTF-8"),
        (SECRET.encode() * 1000, "more than 4,096 bytes"),
    ],
)
def test_a_bad_file_is_refused_by_name_never_by_content(file, content, problem):
    file.write_bytes(content)
    with pytest.raises(ArgumentError, match=problem) as raised:
        Settings.from_environment({"PACKEDCOMM_SECRET_FILE": str(file)})
    assert str(file) in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("path", "problem"),
    [("absent", "No such file"), (".", "Is a directory"), ("a\x00b", "no such path")],
)
def test_an_unreadable_file_is_refused_by_name(tmp_path, path, problem):
    with pytest.raises(ArgumentError, match=problem):
        Settings.from_environment({"PACKEDCOMM_SECRET_FILE": os.fspath(tmp_path) + "/" + path})


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_may_read_gives_a_warning(file, mode, warned, caplog):
    file.chmod(mode)
    with caplog.at_level(logging.DEBUG):
        Settings.from_environment({"PACKEDCOMM_SECRET_FILE": str(file)})
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert SECRET not in caplog.text
    assert not warned or (str(file) in caplog.text and f"{mode:o}" in caplog.text)


def test_settings_never_show_the_secret():
    settings = Settings(secret=SECRET)
    assert SECRET not in f"{settings} {settings!r} {settings.shown()}"
    assert settings.shown()["secret"] == "(set)"
    assert Settings().shown()["secret"] == ""


def test_the_doctor_never_shows_the_secret(monkeypatch, capsys):
    monkeypatch.setenv("PACKEDCOMM_SECRET", SECRET)
    for arguments in (["doctor"], ["doctor", "--json"]):
        with suppress(SystemExit):
            main(arguments)
        shown = capsys.readouterr()
        assert SECRET not in shown.out + shown.err
    assert json.loads(shown.out)["settings"]["values"]["secret"] == "(set)"
    assert "secret" in json.loads(shown.out)["settings"]["changed"]


def _connect(address, outcome, **options):
    try:
        with Session.connect(address, device="cpu", **options) as end:
            outcome.append(end.describe())
    except packedcomm.PackedCommError as error:
        outcome.append(error)


def _met(ours: dict, theirs: dict):
    """What a receiver with `theirs` has of a sender with `ours`: its description, or its error."""
    outcome: list = []
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", **ours) as sender:
        thread = threading.Thread(
            target=_connect, args=(sender.address, outcome), kwargs=theirs, daemon=True
        )
        thread.start()
        thread.join(30)
        description = f"{sender.describe()} {sender!r} {vars(sender)}"
    return outcome[0], description


QUICK = {"connect_timeout_s": 3.0, "operation_timeout_s": 5.0}


def test_sessions_take_the_secret_of_their_settings(caplog):
    with caplog.at_level(logging.DEBUG):
        met, shown = _met({"secret": SECRET}, {"settings": Settings(secret=SECRET, **QUICK)})
        assert met["rank"] == 1
        met, shown = _met({"settings": Settings(secret=SECRET, **QUICK)}, {"secret": SECRET})
        assert met["rank"] == 1
    assert SECRET not in f"{met} {shown} {caplog.text}"


def test_a_secret_given_to_the_session_wins_over_the_settings():
    other = Settings(secret="another secret of the job", **QUICK)
    met, _ = _met({"secret": SECRET}, {"secret": SECRET, "settings": other})
    assert met["rank"] == 1


def test_another_secret_in_the_settings_is_refused_without_being_shown():
    other = Settings(secret="another secret of the job", **QUICK)
    mine = Settings(secret=SECRET, **QUICK)
    error, shown = _met({"settings": mine}, {"settings": other})
    assert isinstance(error, AuthenticationError)
    assert not any(secret in f"{error} {shown}" for secret in (SECRET, other.secret))


def test_a_short_secret_in_the_settings_is_refused_without_being_shown():
    with pytest.raises(ArgumentError, match="secret has 9 characters") as raised:
        Settings(secret="too short")
    assert "too short" not in str(raised.value)
