# Sourced by the scripts of jobs (slurm/script.py), which set before: logs, failures: folders; restarts: how often what
# failed is tried again; requeue: yes or no; name: of the job, if it has successors, else empty.
# shellcheck shell=bash disable=SC2154

would_fail_again=3 # bad input, which no second try mends
stopped=75         # asked to stop and saved, to be requeued
bad_after=2        # tries that failed on a node after which it is left out

# A bare id of an array's task may stand for the whole array.
job="$SLURM_JOB_ID"
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
log="$logs/${job}_0_log.err"
began=$(wc -l < "$log")
tries="$failures/${name:-$job}"

if [ -n "$name" ] && [ -e "$tries.final" ]; then # the job that this one succeeds has failed for good
    exit "$would_fail_again"
fi

# finish CODE: the last thing that a script does. What failed is tried again where that may help. Being stopped does not
# count, nor does it when the script's own node dies: SLURM requeues that job.
finish() {
    code=$1
    case "$code" in 0 | "$would_fail_again" | "$stopped") ;; *) note_failure ;; esac
    if [ -n "$name" ] && [ "$code" -ne 0 ] && [ "$code" -ne "$stopped" ]; then
        mkdir -p "$failures" && : > "$tries.final"
    fi
    [ "$code" -ne "$stopped" ] || [ "$requeue" != yes ] || run_again
    exit "$code"
}

note_failure() {
    mkdir -p "$failures"
    # srun names the node of the first rank that fails; it ends the others itself.
    node=$(tail -n "+$((began + 1))" "$log" | sed -n 's/^srun: error: \([^:,[]*\): task.*/\1/p' | head -n 1)
    [ -n "$node" ] || [ "$SLURM_JOB_NUM_NODES" -ne 1 ] || node="$SLURM_JOB_NODELIST"
    [ -z "$node" ] || echo "$node" >> "$failures/nodes"
    echo "$code $SLURM_JOB_NODELIST" >> "$tries"
    [ "$(wc -l < "$tries")" -gt "$restarts" ] || code=$stopped
}

run_again() {
    # Not what was cancelled meanwhile, nor what SLURM requeues itself.
    case "$(squeue --noheader --jobs="$job" --format=%T)" in COMPLETING | CANCELLED | PREEMPTED) return ;; esac
    bad=$(sort "$failures/nodes" 2> /dev/null | uniq -c | awk -v least="$bad_after" '$1 >= least {print $2}')
    up=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,mix,alloc,comp --format=%N | sort -u)
    if [ "$(echo "$up" | grep -cvxF "$bad")" -lt "$SLURM_JOB_NUM_NODES" ]; then bad=; fi
    trap : TERM # which requeuing sends; only a job that waits can be told what to leave out
    for _ in 1 2 3 4 5 6; do
        if scontrol requeue "$job"; then
            [ -z "$bad" ] || scontrol update "JobId=$job" "ExcNodeList=$(echo "$bad" | paste -sd,)"
            sleep 120
            return
        fi
        sleep 10
    done
}
