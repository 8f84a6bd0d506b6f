"""The progress line on a real pseudo-terminal, under a script that prints and logs as scripts do."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROWS, COLUMNS, BOUND_S = 12, 100, 100.0

SCRIPT = """
import logging, sys, time
import torch
from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer

logging.basicConfig(level=logging.INFO, format="log %(message)s", stream=sys.stderr)  # keeps this very stream
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
disk = sys.argv[1]
with ResilientTrainer(
    model, optimizer,
    checkpoint=CheckpointConfig(non_persistent_ckpt_type="local", non_persistent_save_interval=5,
                                non_persistent_local_ckpt_dir=disk + "/disk"),
    resiliency=ResiliencyConfig(run_id="r", node_id="n", memory_dir=disk + "/memory"),
) as trainer:
    for iteration in trainer.iterations(int(sys.argv[2])):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"print {iteration}")
        logging.info("%d", iteration)
        time.sleep(0.08)
print("the end")
"""


class Emulator:
    """As much of a terminal as the line uses: rows, a scrolling region, the cursor."""

    def __init__(self) -> None:
        self.rows = [""] * ROWS
        self.gone: list[str] = []  # rows that scrolled out at the top
        self.row = self.column = 0
        self.bottom = ROWS - 1
        self.saved = (0, 0)
        self.last_rows: list[str] = []  # what stood in the last row while it was no part of what scrolls

    def feed(self, text: str) -> None:
        for escape, character in re.findall(r"(\x1b7|\x1b8|\x1b\[[\d;?]*[A-Za-z])|([^\x1b])", text, flags=re.DOTALL):
            if escape:
                self.control(escape)
            else:
                self.put(character)

    def put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            if self.row == self.bottom:
                self.gone.append(self.rows[0])
                self.rows[: self.bottom + 1] = [*self.rows[1 : self.bottom + 1], ""]
            else:
                self.row = min(self.row + 1, ROWS - 1)
        else:
            line = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def control(self, escape: str) -> None:
        numbers = [int(number) for number in re.findall(r"\d+", escape)]
        match escape[-1]:
            case "7":
                self.saved = (self.row, self.column)
            case "8":
                if self.bottom < ROWS - 1:
                    self.last_rows.append(self.rows[-1])
                self.row, self.column = self.saved
            case "r":
                self.bottom = numbers[1] - 1 if numbers else ROWS - 1
                self.row = self.column = 0
            case "H":
                self.row, self.column = numbers[0] - 1, numbers[1] - 1
            case "K":
                self.rows[self.row] = ""
            case "A":
                self.row -= 1
            case "m":
                pass
            case _:
                raise AssertionError(f"not known to this terminal: {escape!r}")

    @property
    def printed(self) -> list[str]:
        return [row.rstrip() for row in (*self.gone, *self.rows) if row.strip()]


def run_script(tmp_path: Path, steps: int, **env: str) -> str:
    """What reaches the terminal."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    end, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    clean = {name: value for name, value in os.environ.items() if name not in ("CI", "RESILIENCE_PROGRESS")}
    process = subprocess.Popen(
        [sys.executable, script, str(tmp_path), str(steps)], stdin=there, stdout=there, stderr=there,
        env={**clean, "TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **env},
    )  # fmt: skip
    os.close(there)
    shown, deadline = b"", time.monotonic() + BOUND_S
    try:
        while time.monotonic() < deadline:
            if not select.select([end], [], [], 0.1)[0]:
                continue
            try:
                shown += os.read(end, 65536)
            except OSError:  # the last writer is gone
                break
        assert process.wait(timeout=10) == 0, shown.decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(end)
    return shown.decode()


def test_the_line_stays_below_what_the_script_prints_and_logs_and_goes_at_the_end(tmp_path: Path) -> None:
    terminal = Emulator()
    terminal.feed(run_script(tmp_path, 60))
    own = [f"{what} {n}" for n in range(1, 61) for what in ("print", "log")]
    assert [row for row in terminal.printed if re.fullmatch(r"(print|log) \d+", row)] == own, "whole, and in order"
    assert [row for row in terminal.printed if not row.startswith("[resilience]")] == [*own, "the end"]
    lines = {row.strip() for row in terminal.last_rows if row.strip()}
    assert len(lines) >= 2, "it goes on as training does"
    assert all(re.match(r"iteration \d+ · (safe \d+|nothing saved yet)", line) for line in lines), lines
    assert any(re.search(r"safe \d+ · stall .* per save · goodput", line) for line in lines), lines
    assert terminal.bottom == ROWS - 1, "the last row scrolls again"


def test_it_is_off_where_it_was_turned_off(tmp_path: Path) -> None:
    assert "\x1b" not in run_script(tmp_path, 30, RESILIENCE_PROGRESS="0")
