import os
import sys
import time

from llm_jax import progress


def work(seconds):
    with progress.byte_bar(10, "tokenize") as bar:
        for _ in range(10):
            time.sleep(seconds)
            bar.update(1)


def test_in_a_log_file_a_line_now_and_then_and_only_if_it_takes_long(capsys, monkeypatch):
    work(0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    work(0.01)
    lines = [line.strip() for line in capsys.readouterr().err.split("\n") if line.strip()]
    assert 2 <= len(lines) <= 6
    assert all(line.startswith("tokenize: ") and line.endswith(" left") for line in lines)


def test_in_a_notebook_it_is_drawn_at_once(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    work(0)
    assert "tokenize:" in capsys.readouterr().err


def test_talk_that_nobody_hears_is_no_error(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        progress.say("hello")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # so that closing can flush
