"""The example GPT as a job script's payload on a cluster that is one host: each node has directories of its own."""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

import torch

NODE = os.environ["SLURMD_NODENAME"]
PACE_S = float(os.environ.get("PAYLOAD_PACE_S", "0"))


def main() -> None:
    local = "RESILIENCE_CHECKPOINT__NON_PERSISTENT_LOCAL_CKPT_DIR"
    os.environ[local] = f"{os.environ[local]}/{NODE}"
    step = torch.optim.AdamW.step

    def paced(self: torch.optim.AdamW, *arguments: object, **named: object) -> object:
        time.sleep(PACE_S)  # else a run is over before anything can happen to it
        return step(self, *arguments, **named)  # type: ignore[arg-type]

    torch.optim.AdamW.step = paced  # type: ignore[method-assign, assignment]
    script = Path(__file__).parents[2] / "examples" / "gpt.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


main()
