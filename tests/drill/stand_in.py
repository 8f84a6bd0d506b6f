"""A training script that tells the events a trainer tells and keeps its "state" in one file per save: for tests of the
drill itself. It trains nothing; its state is a running hash of the iterations done, so that repeated or skipped work
shows in the final digest."""

import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from resilience.drill.rehearsal import Rehearsal
from resilience.observe.events import EventLog
from resilience.runtime.clock import SystemClock

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
rehearsal = Rehearsal.from_environment(os.environ, rank)
assert rehearsal is not None
assert rehearsal.train_iters is not None
node = os.environ["RESILIENCE_NODE_ID"]
events = EventLog(Path(os.environ["RESILIENCE_RESILIENCY__EVENTS"]), node, rank, SystemClock())
save_text = os.environ["RESILIENCE_CHECKPOINT__SAVE"]
save = None if save_text == "null" else Path(save_text)
disk = Path(os.environ.get("RESILIENCE_CHECKPOINT__NON_PERSISTENT_LOCAL_CKPT_DIR", "/nonexistent"))

dist.init_process_group("gloo")
saves = sorted(save.glob(f"rank{rank}-*.json")) if save else []
# A rank may be one save ahead of another when it was killed; the trainer elects, the stand-in takes the newest of all.
newest = [None] * world_size
dist.all_gather_object(newest, [path.name.split("-")[1] for path in saves])
common = sorted(set.intersection(*(set(names) for names in newest)))
generation = 1 + len(set((save / "generations").read_text().split()) if common else ())
events.attempt = f"g{generation:04d}-00000000"
events.emit("start", world_size=world_size, generation=generation, run_id="drill", local_rank=0)
iteration, state = 0, "begin"
if common:
    kept = json.loads((save / f"rank{rank}-{common[-1]}").read_text())
    iteration, state = kept["iteration"], kept["state"]
    events.emit("resume", iteration=iteration, generation=kept["generation"], tier="local", seconds=0.01,
                retrieved_bytes=0, own_copies=1, replica_copies=0, rebuilt=0, passed_over=[])  # fmt: skip
else:
    events.emit("fresh", reason="no save")
dist.barrier()
while iteration < rehearsal.train_iters:
    time.sleep(0.02)
    dist.barrier()  # as a training step's all-reduce: nobody gets ahead
    iteration += 1
    state = hashlib.sha256(f"{state} {iteration} {rank}".encode()).hexdigest()
    if save and iteration % int(os.environ["RESILIENCE_CHECKPOINT__NON_PERSISTENT_SAVE_INTERVAL"]) == 0:
        path = save / f"rank{rank}-{iteration:07d}.json"
        path.write_text(json.dumps({"iteration": iteration, "state": state, "generation": generation}))
        with (save / "generations").open("a") as stream:
            stream.write(f"{generation}\n")
        try:
            copy = disk / "drill" / node / f"iter_{iteration:07d}" / f"g{generation:04d}-00000000"
            copy.mkdir(parents=True, exist_ok=True)
            name = f"rank_{rank:05d}-of-{world_size:05d}"
            (copy / f"{name}.safetensors").write_bytes(b"x" * 4096)
            (copy / f"{name}.json").write_text(
                json.dumps({"iteration": iteration, "generation": generation, "owner": rank, "role": "primary"})
            )
            events.emit(
                "snapshot", iteration=iteration, kind="non_persistent", tiers=["local"], stall_s=0.001, bytes=4096
            )
        except OSError as error:
            events.emit("save_failed", iteration=iteration, tier="local", error=str(error))
    events.emit("step", iteration=iteration, step_s=0.02)
    if rehearsal.due(iteration) == "hang":  # the watchdog's part, which a trainer has of its own
        threading.Timer(1.0, lambda: (events.emit("hang", seconds=1.0), os._exit(1))).start()
    rehearsal.act(iteration, settle=lambda timeout_s: None, tell=events.emit)
if "--broken" in sys.argv and save:
    state = "another end"
events.emit("digest", iteration=iteration, digest=state)
events.emit("finished", iteration=iteration)
dist.destroy_process_group()
