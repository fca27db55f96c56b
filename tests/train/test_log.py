"""metrics.jsonl is read around whatever is broken in it, and cut back on resume."""
import json
import warnings

import pytest

from r1zero.train.log import MetricsLog, read_metrics

ROWS = [{"step": n, "loss": 1.0 / n} for n in range(1, 6)]
BROKEN = {
    "half a line": b'{"step": 3, "lo',
    "no JSON": b"Traceback (most recent call last):",
    "no object": b"[1, 2]",
    "no step": b'{"loss": 1}',
    "a step that is text": b'{"step": "3"}',
    "bytes that are not UTF-8": b'{"step": 3, "note": "\xff\xfe"}',
    "zeros, as after a power cut": b"\0" * 40,
    "very deep": b"[" * 100_000,
}


def log_of(folder, lines: list[bytes]) -> None:
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_is_left_out_and_named(tmp_path, kind):
    lines = [json.dumps(row).encode() for row in ROWS]
    log_of(tmp_path, [*lines[:2], BROKEN[kind], *lines[2:]])
    with pytest.warns(UserWarning, match="lines that cannot be read are left out: 3;"):
        assert read_metrics(tmp_path) == ROWS


def test_many_broken_lines_are_counted(tmp_path):
    log_of(tmp_path, [b"?"] * 9 + [json.dumps(ROWS[0]).encode()])
    with pytest.warns(UserWarning, match="left out: 1, 2, 3, 4, 5 and 4 more;"):
        assert read_metrics(tmp_path) == ROWS[:1]


def test_half_a_last_line_blank_lines_and_odd_line_breaks_are_no_reason_to_warn(tmp_path):
    row = {"step": 1, "note": "one\u2028line"}
    text = json.dumps(row, ensure_ascii=False).encode() + b"\r\n\n" + json.dumps(ROWS[1]).encode() + b'\n{"st'
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_metrics(tmp_path) == [row, ROWS[1]]


def test_a_log_is_cut_back_to_the_checkpoint_and_mended(tmp_path):
    lines = [json.dumps(row).encode() for row in ROWS]
    log_of(tmp_path, [lines[0], b"?", *lines[1:], b'{"step": 6, "lo'])
    with pytest.warns(UserWarning, match="left out: 2, 7;"):
        log = MetricsLog(tmp_path, last_step=3)
    log.write({"step": 4, "loss": 0.5})
    log.close()
    assert read_metrics(tmp_path) == [*ROWS[:3], {"step": 4, "loss": 0.5}]
