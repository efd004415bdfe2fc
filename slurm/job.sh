# Sourced by the scripts of jobs (slurm/script.py), which set before: gm_logs, gm_failures: folders; gm_restarts: how
# often what failed is tried again; gm_requeue: yes or no; gm_name: of the job, if it has successors, else empty.
# shellcheck shell=bash disable=SC2154

gm_would_fail_again=3 # bad input, which no second try mends
gm_out_of_time=74     # told to stop by its time limit with nothing to save: counts as a failure, but not of its node
gm_stopped=75         # asked to stop and saved, to be requeued
gm_bad_after=2        # tries that failed on a node after which it is left out

# A bare id of an array's task may stand for the whole array.
gm_job="$SLURM_JOB_ID"
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || gm_job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
gm_log="$gm_logs/${gm_job}_0_log.err"
gm_began=$(wc -l < "$gm_log")
gm_tries="$gm_failures/${gm_name:-$gm_job}"

if [ -n "$gm_name" ] && [ -e "$gm_tries.final" ]; then # the job that this one succeeds has failed for good
    exit "$gm_would_fail_again"
fi
trap 'finish $?' EXIT # also where a site's own lines make bash end at the first error

# finish CODE: the last thing that a script does. What failed is tried again where that may help. Being stopped does not
# count, nor does it when the script's own node dies: SLURM requeues that job.
finish() {
    set +eu
    trap - EXIT
    gm_code=$1
    case "$gm_code" in 0 | "$gm_would_fail_again" | "$gm_stopped") ;; *) gm_note_failure ;; esac
    if [ -n "$gm_name" ] && [ "$gm_code" -ne 0 ] && [ "$gm_code" -ne "$gm_stopped" ]; then
        mkdir -p "$gm_failures" && : > "$gm_tries.final"
    fi
    [ "$gm_code" -ne "$gm_stopped" ] || [ "$gm_requeue" != yes ] || gm_run_again
    exit "$gm_code"
}

gm_note_failure() {
    mkdir -p "$gm_failures"
    # srun names the node of the first rank that fails; it ends the others itself.
    gm_node=$(tail -n "+$((gm_began + 1))" "$gm_log" | sed -n 's/^srun: error: \([^:,[]*\): task.*/\1/p' | head -n 1)
    [ -n "$gm_node" ] || [ "$SLURM_JOB_NUM_NODES" -ne 1 ] || gm_node="$SLURM_JOB_NODELIST"
    if [ "$gm_code" -ne "$gm_out_of_time" ] && [ -n "$gm_node" ]; then echo "$gm_node" >> "$gm_failures/nodes"; fi
    # What cannot be counted is not tried again.
    echo "$gm_code $SLURM_JOB_NODELIST" >> "$gm_tries" || return
    [ "$(wc -l < "$gm_tries")" -gt "$gm_restarts" ] || gm_code=$gm_stopped
}

gm_run_again() {
    # Not what was cancelled meanwhile, nor what SLURM requeues itself.
    case "$(squeue --all --noheader --jobs="$gm_job" --format=%T)" in COMPLETING | CANCELLED | PREEMPTED) return ;; esac
    gm_bad=$(gm_bad_nodes)
    trap : TERM # which requeuing sends; only a job that waits can be told what to leave out
    for _ in $(seq 60); do # a controller may be down for a while
        if scontrol requeue "$gm_job"; then
            [ -z "$gm_bad" ] || scontrol update "JobId=$gm_job" "ExcNodeList=$gm_bad"
            sleep 120
            return
        fi
        sleep 10
    done
}

# Print the nodes to leave out, those that the job leaves out anyway among them; nothing if too few others would be left.
gm_bad_nodes() {
    gm_bad=$(sort "$gm_failures/nodes" 2> /dev/null | uniq -c | awk -v least="$gm_bad_after" '$1 >= least {print $2}')
    [ -n "$gm_bad" ] || return
    gm_about=$(scontrol --oneliner show job "$gm_job")
    gm_feature=$(echo "$gm_about" | sed -n 's/.* Features=\([^ ]*\).*/\1/p')
    case "$gm_feature" in "(null)") gm_feature= ;; *[!A-Za-z0-9_.-]*) return ;; esac # who has a mix of them is not known
    gm_up=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,mix,alloc,comp \
        --format="%N ,%f," | grep -F ",$gm_feature" | cut -d " " -f 1 | sort -u)
    [ "$(echo "$gm_up" | grep . | grep -cvxF "$gm_bad")" -ge "$SLURM_JOB_NUM_NODES" ] || return
    gm_before=$(echo "$gm_about" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    [ "$gm_before" != "(null)" ] || gm_before=
    echo "$gm_before${gm_before:+,}$(echo "$gm_bad" | paste -sd,)"
}
