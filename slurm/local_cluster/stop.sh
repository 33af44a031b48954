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
  local of_jobs
  mapfile -t of_jobs < <(grep -lzsxF "SLURM_CONF=$folder/slurm.conf" /proc/[0-9]*/environ)
  {
    grep -lzsxF "SDTRAIN_LOCAL_CLUSTER=$folder" /proc/[0-9]*/environ || true # 2 where a process went meanwhile
    [ "${#of_jobs[@]}" = 0 ] || grep -lzs '^SLURM_JOB_ID=' "${of_jobs[@]}" || true
  } | cut -d / -f 3 | sort -u
}

# Whether a command came true within so many seconds.
within() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.2
  done
}

no_jobs() { [ -z "$(timeout 10 squeue --noheader 2>/dev/null)" ]; }
if ! no_jobs; then
  timeout 10 squeue --noheader --format %A | timeout 10 xargs --no-run-if-empty scancel || true
  within 40 no_jobs || echo "stop.sh: jobs did not end within 40 s" >&2
fi

# The newest first, so that munged outlives those who ask it.
while read -r pid began; do
  if is_ours "$pid" "$began"; then
    kill -TERM "$pid"
    gone() { ! is_ours "$pid" "$began"; }
    within 20 gone || kill -KILL "$pid"
  fi
done < <(tac "$folder/pids")

nothing_left() { [ -z "$(left)" ]; }
if ! within 15 nothing_left; then
  echo "stop.sh: still there:" >&2
  left | xargs --no-run-if-empty ps -o pid,ppid,args -p >&2 || true
  exit 1
fi
rm "$folder/pids"
echo "stop.sh: the cluster in $folder has ended, nothing is left; its logs are in $folder/log" >&2
