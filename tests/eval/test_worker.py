"""The worker process: limits, restarts, order, and that nothing of it is left behind."""
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r1zero.eval.worker import Overrun, Worker

MODULE = "odd_worker"
SOURCE = '''
import os, sys, time
from r1zero.eval.worker import serve

def load():
    seen = []
    def double(value):
        print("noise on stdout")
        seen.append(value)
        return value * 2
    return {"double": double, "count": lambda: len(seen), "pid": os.getpid, "fail": lambda: 1 / 0,
            "power": lambda: 10 ** (10 ** 10), "memory": lambda: len(bytearray(1 << 33)),
            "sleep": time.sleep, "exit": lambda: os._exit(0), "odd": lambda: "\\u2028\\ud83e",
            "deep": lambda: eval("(" * 90 + ")" * 90 + "[")}

if __name__ == "__main__":
    serve(load)
'''


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_for_end(pid: int) -> bool:
    until = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = Worker(MODULE, seconds=0.3)
    yield made
    made.close()


def test_replies_come_in_order_and_a_fault_is_null(worker):
    assert [worker.ask("double", i) for i in range(20)] == [2 * i for i in range(20)]
    assert worker.ask("fail") is None and worker.ask("deep") is None and worker.ask("no such") is None
    assert worker.ask("double", "\u2028ü\n") == "\u2028ü\n" * 2 and worker.ask("odd") == "\u2028\ud83e"
    assert worker.ask("count") == 21  # one process answered them all


def test_threads_wait_for_each_other(worker):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: worker.ask("double", i), range(200))) == [2 * i for i in range(200)]


@pytest.mark.skipif(sys.platform != "linux", reason="another system keeps no limit of memory")
@pytest.mark.parametrize("question, why", [("power", "0.3 seconds of processor time"), ("memory",
    "MiB of memory")])
def test_a_question_that_takes_too_much_is_told_and_the_next_is_answered(worker, question, why):
    first = worker.ask("pid")
    with pytest.raises(Overrun, match=why):
        worker.ask(question)
    assert worker.ask("double", 4) == 8 and worker.ask("pid") != first and wait_for_end(first)


def test_a_question_that_waits_is_ended_by_the_clock(worker):
    worker.seconds = 0.004  # 0.4 seconds on the clock
    with pytest.raises(Overrun, match="0.4 seconds on the clock"):
        worker.ask("sleep", 60)
    worker.seconds = 0.3
    assert worker.ask("double", 1) == 2


def test_a_worker_that_somebody_killed_is_replaced(worker):
    first = worker.ask("pid")
    os.kill(first, signal.SIGKILL)
    assert worker.ask("double", 3) == 6 and worker.ask("pid") != first
    with pytest.raises(Overrun, match="the worker ended over it, 2 times"):
        worker.ask("exit")
    assert worker.ask("double", 3) == 6


class Interrupted(BaseException):
    """As KeyboardInterrupt is one."""


def interrupt(seconds, call):
    """Raise out of a call after some seconds, as Ctrl-C does."""
    def handler(*_):
        raise Interrupted
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(Interrupted):
            call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such timer here")
def test_a_question_that_was_interrupted_does_not_answer_the_next(worker):
    first = worker.ask("pid")
    interrupt(0.1, lambda: worker.ask("sleep", 0.4))
    assert [worker.ask("double", i) for i in (1, 2, 3)] == [2, 4, 6]
    assert worker.ask("pid") != first and wait_for_end(first)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such timer here")
def test_a_start_that_was_interrupted_is_not_taken_for_a_reply(tmp_path, worker):
    (tmp_path / "slow_worker.py").write_text(SOURCE.replace("seen = []", "seen = []; time.sleep(0.5)", 1))
    slow = Worker("slow_worker")
    interrupt(0.2, lambda: slow.ask("double", 7))
    assert [slow.ask("double", i) for i in (1, 2)] == [2, 4]
    slow.close()


def test_a_worker_that_is_killed_in_mid_answer_answers_nobody_else(worker):
    """Eight threads ask a fresh worker, which is killed meanwhile: each has its own reply, or none."""
    def ask(i):
        if i % 10 == 5:
            os.kill(worker.ask("pid"), signal.SIGKILL)
        worker.ask("sleep", 0.001)
        return worker.ask("double", i)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(40))) == [2 * i for i in range(40)]
    first = worker.ask("pid")
    killer = threading.Timer(0.2, os.kill, (first, signal.SIGKILL))
    killer.start()
    assert worker.ask("sleep", 0.5) is None and worker.ask("double", 4) == 8  # it is asked once more
    killer.join()


def test_a_module_that_does_not_start_is_named(worker, tmp_path):
    (tmp_path / "broken.py").write_text("raise ValueError")
    with pytest.raises(RuntimeError, match="the process broken does not start .*ended with code 1"):
        Worker("broken").ask("double", 1)
    (tmp_path / "poor.py").write_text(
        "from r1zero.eval.worker import serve\ndef load():\n    import no_such_package\nserve(load)\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as caught:
        Worker("poor").ask("double", 1)
    assert caught.value.name == "no_such_package"


def test_the_current_folder_is_no_place_to_look(worker, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    (there / "json.py").write_text("raise ValueError")
    monkeypatch.chdir(there)
    assert worker.ask("double", 1) == 2


def ask_in_child(worker, queue):
    queue.put((worker.ask("double", 5), worker.ask("pid")))
    worker.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_that_was_forked_has_a_worker_of_its_own(worker):
    mine = worker.ask("pid")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=ask_in_child, args=(worker, queue))
    child.start()
    reply, its = queue.get(timeout=60)
    child.join(60)
    assert reply == 10 and its != mine and wait_for_end(its)
    assert worker.ask("pid") == mine


@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), 9)", "raise ValueError", "os._exit(0)"])
def test_nothing_is_left_when_the_caller_ends_however_it_ends(worker, tmp_path, ending):
    """The script has no guard around its main part, and asks while it is imported."""
    script = tmp_path / "script.py"
    script.write_text(f"import os\nfrom r1zero.eval.worker import Worker\nworker = Worker({MODULE!r})\n"
                      f"print(worker.ask('pid'), flush=True)\n{ending}\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert wait_for_end(int(done.stdout)), done.stderr
