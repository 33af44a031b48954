#!/usr/bin/env bash
# Stop what start.sh started in FOLDER (default /tmp/sdtrain-slurm), by process id, and look that nothing is left.
#
#   slurm/local_cluster/stop.sh [FOLDER]
set -euo pipefail

folder=$(realpath --canonicalize-missing "${1:-/tmp/sdtrain-slurm}")
export SLURM_CONF=$folder/slurm.conf
if [ ! -e "$folder/pids" ]; then
  echo "stop.sh: $folder/pids is not there: no cluster was started in this folder" >&2
  exit 2
fi

# Whether a process is still the one that start.sh wrote down, and not a later one with the same number.
is_ours() {
  [ "$(cut -d ' ' -f 22 "/proc/$1/stat" 2>/dev/null)" = "$2" ] && ! grep -qs '^State:.Z' "/proc/$1/status"
}

# Daemons, their helpers and the processes of jobs, by what their environment says; a shell that merely uses the
# cluster has no job.
left() {
  local one
  for one in /proc/[0-9]*; do
    if tr '\0' '\n' 2>/dev/null <"$one/environ" | awk -v folder="$folder" '
      $0 == "SDTRAIN_LOCAL_CLUSTER=" folder { found = 1 }
      $0 == "SLURM_CONF=" folder "/slurm.conf" { conf = 1 }
      /^SLURM_JOB_ID=/ { job = 1 }
      END { exit !(found || (conf && job)) }'; then
      echo "${one#/proc/}"
    fi
  done
}

wait_until() {
  local tries
  for ((tries = 0; tries < 200; tries++)); do
    if "$@"; then return; fi
    sleep 0.2
  done
  return 1
}

no_jobs() { [ -z "$(timeout 10 squeue --noheader 2>/dev/null)" ]; }
if ! no_jobs; then
  timeout 10 squeue --noheader --format %A | timeout 10 xargs --no-run-if-empty scancel || true
  wait_until no_jobs || echo "stop.sh: jobs did not end in 40 s" >&2
fi

# The newest first, so that munged outlives those who ask it.
while read -r pid began; do
  if is_ours "$pid" "$began"; then
    kill -TERM "$pid"
    gone() { ! is_ours "$pid" "$began"; }
    wait_until gone || kill -KILL "$pid"
  fi
done < <(tac "$folder/pids")

nothing_left() { [ -z "$(left)" ]; }
if ! wait_until nothing_left; then
  echo "stop.sh: still there:" >&2
  left | xargs --no-run-if-empty ps -o pid,ppid,args -p >&2
  exit 1
fi
rm "$folder/pids"
echo "stop.sh: the cluster in $folder has ended, nothing is left; its logs are in $folder/log" >&2
