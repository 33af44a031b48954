#!/usr/bin/env bash
# Start a Slurm of two nodes on this machine: a real slurmctld, two real slurmd and a munged of its own.
#
#   eval "$(slurm/local_cluster/start.sh [FOLDER])"    # sets SLURM_CONF: sbatch, squeue, ... talk to this cluster now
#   slurm/local_cluster/stop.sh [FOLDER]
#
# Everything lives in FOLDER (default /tmp/sdtrain-slurm) and listens on loopback alone; nothing under /etc is read or
# written. Each node claims 8 GPUs that do not exist, so that scripts for real nodes can be submitted unchanged.
# Partitions: `main` (the default), and `urgent`, whose jobs requeue those of `main`.
set -euo pipefail

folder=$(realpath --canonicalize-missing "${1:-/tmp/sdtrain-slurm}")
install="apt-get update && apt-get install --yes slurmctld slurmd slurm-client munge"

fail() {
  echo "start.sh: $*" >&2
  exit 9
}

for program in slurmctld slurmd sbatch munged; do
  PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || fail "$program is missing; install Slurm with: $install"
done
[ "$(id -u)" = 0 ] || fail "run as root: slurmd starts jobs for other users (sudo $0 $folder)"
[ ! -e "$folder/pids" ] || fail "$folder/pids: a cluster was started here; stop it first: ${0%start.sh}stop.sh $folder"
[ "${#folder}" -le 80 ] || fail "$folder: a socket's path may have 107 characters; give a shorter folder"
export PATH=$PATH:/usr/sbin

mkdir -p "$folder"/{state,log,spool-n1,spool-n2}
chmod 755 "$folder" "$folder/log"

# Three ports that nobody listens on.
free_ports() {
  local port found=0
  for ((port = 20000 + RANDOM % 10000; found < 3; port++)); do
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      found=$((found + 1))
    fi
  done
}
mapfile -t ports < <(free_ports)

# The daemons find each other by the name of the machine, which need not lead to loopback. In a UTS namespace of their
# own its name is `localhost`, which always does. Ports open there alone: see NoInAddrAny below.
cat >"$folder/slurm.conf" <<END
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
# cred_expire is also how long a requeued job waits; 120 by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=30
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=5,sched_min_interval=0
ReturnToService=2
KillWait=15
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=16 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=16 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=24:00:00
END
touch "$folder"/gpu{0..7}
echo "NodeName=n[1-2] Name=gpu File=$folder/gpu[0-7]" >"$folder/gres.conf"

# A daemon is remembered by its process id and the time that the process began, which tells it from a later process.
remember() {
  echo "$1 $(cut -d ' ' -f 22 "/proc/$1/stat")" >>"$folder/pids"
}

spawn() {
  local log=$1
  shift
  SLURM_CONF=$folder/slurm.conf SDTRAIN_LOCAL_CLUSTER=$folder setsid unshare --uts \
    sh -c 'hostname localhost && exec "$@"' sh "$@" </dev/null >>"$log" 2>&1 &
  remember $!
}

wait_for() {
  local what=$1 tries
  shift
  for ((tries = 0; tries < 150; tries++)); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.2
  done
  tail -n 5 "$folder"/log/*.log >&2
  "${0%start.sh}stop.sh" "$folder" >&2 || true
  fail "$what did not come up within 30 s; logs are in $folder/log"
}

export SLURM_CONF=$folder/slurm.conf
(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
spawn "$folder/log/munged.log" munged --foreground --num-threads 2 --key-file "$folder/munge.key" \
  --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" --seed-file "$folder/munge.seed" \
  --log-file "$folder/log/munged.log"
wait_for munged munge --no-input --socket "$folder/munge.socket"
spawn "$folder/log/slurmctld.out" slurmctld -D -c
spawn "$folder/log/slurmd-n1.out" slurmd -D -N n1
spawn "$folder/log/slurmd-n2.out" slurmd -D -N n2
both_idle() { [ "$(sinfo --noheader --partition main --states idle --format %D)" = 2 ]; }
wait_for "the cluster of two nodes" both_idle

echo "start.sh: two nodes are up, everything is in $folder" >&2
echo "export SLURM_CONF=$folder/slurm.conf"
