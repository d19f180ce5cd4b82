"""The demo's way through its commands; that it makes good pictures is measured, see docs/benchmarks.md."""

import json
import os
import signal
import threading

import pytest

from ldm_jax import demo


def test_a_training_that_was_stopped_stops_the_demo(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"steps": 20}))
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    monkeypatch.setattr(demo, "command", lambda *arguments: None)
    with pytest.raises(SystemExit, match="was stopped; the same command goes on with it"):
        demo.train("demo.py", tmp_path)
    (tmp_path / "checkpoints" / "20").mkdir()
    demo.train("demo.py", tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_left_to_the_command(number, tmp_path):
    ready, told = tmp_path / "ready", tmp_path / "told"
    code = (
        "import pathlib, signal, sys, time\n"
        "def tell(*_):\n"
        f"    pathlib.Path({str(told)!r}).touch(); sys.exit(0)\n"
        "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, tell)\n"
        f"pathlib.Path({str(ready)!r}).write_text(str(__import__('os').getpid()))\n"
        "time.sleep(60)\n"
    )

    def send():
        while not (ready.is_file() and ready.read_text()):
            pass
        os.kill(os.getpid(), number)
        if number == signal.SIGINT:  # a terminal sends it to both
            os.kill(int(ready.read_text()), number)

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    thread = threading.Thread(target=send)
    thread.start()
    demo.command("-c", code)
    thread.join()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert told.exists()


def test_a_command_that_fails_ends_the_demo_with_its_status():
    with pytest.raises(SystemExit) as ended:
        demo.command("-c", "import sys; sys.exit(7)")
    assert ended.value.code == 7
