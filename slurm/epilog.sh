#!/bin/bash
# For slurm.conf's Epilog: frees what finished runs left in a node's memory, and what nobody came back for.
#
#     Epilog=/etc/slurm/epilog.d/resilience.sh        with RESILIENCE_MEMORY=/dev/shm/run in it, or in its environment
#
# An epilog runs on each node after every job, also when the job is put back into the queue: then the copies here are what
# it will go on from. So a run goes only if its attempt log says "finished", or if nothing in it changed for KEEP_HOURS.
# `resilience prune` takes the directory's lock: a run that is live again is left alone.

RESILIENCE_MEMORY=${RESILIENCE_MEMORY:-/dev/shm/run}
KEEP_HOURS=${KEEP_HOURS:-48}
RESILIENCE=${RESILIENCE:-resilience}

for run in "$RESILIENCE_MEMORY"/*/; do
    [ -d "$run" ] || continue
    run_id=$(basename "$run")
    "$RESILIENCE" outcome --local "$RESILIENCE_MEMORY" --run-id "$run_id" >/dev/null 2>&1
    outcome=$?
    if [ "$outcome" -eq 3 ]; then continue; fi # it is running
    if [ "$outcome" -ne 0 ] && [ -n "$(find "$run" -mmin "-$((60 * KEEP_HOURS))" -print -quit)" ]; then continue; fi
    "$RESILIENCE" prune --local "$RESILIENCE_MEMORY" --forget "$run_id" ||
        logger -t resilience "run $run_id stays in $RESILIENCE_MEMORY" 2>/dev/null
done
exit 0 # an epilog that fails drains the node
