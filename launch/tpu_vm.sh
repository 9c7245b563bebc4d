#!/usr/bin/env bash
# A run on a slice of Cloud TPUs, by its VMs: launch/tpu_vm.sh create|install|mount|prepare|start|logs|stop|check|delete
#
# Needs gcloud, logged in. `start` also resumes; `stop` saves first. What is run: launch/settings.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/settings.sh

TPU=${TPU:-moc}
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-512}                             # 256 chips
VERSION=${VERSION:-v2-alpha-tpuv5}
SHARE=${SHARE:-10.0.0.2:/videos}                  # a Filestore share, mounted at /mnt/shared

everywhere() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker="${WORKER:-all}" --command "$1"; }

in_background() { # what it prints goes to NAME.log on each host, its process id to NAME.pid
  everywhere "cd moc_jax && . .venv/bin/activate &&
    if kill -0 \$(cat ~/$1.pid) 2>/dev/null; then echo '$1 runs already'; exit 1; fi &&
    { setsid nohup $2 >> ~/$1.log 2>&1 < /dev/null & echo \$! > ~/$1.pid; }"
}

case "${1:-}" in
  create)
    gcloud compute tpus tpu-vm create "$TPU" --zone "$ZONE" --accelerator-type "$TYPE" --version "$VERSION" --spot
    ;;
  install) # this clone's last commit, on every host
    archive=$(mktemp -d)/moc_jax.tar.gz
    git archive --format=tar.gz --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:moc_jax.tar.gz" --zone "$ZONE" --worker=all
    everywhere "python3 -m pip install --quiet --user uv && ~/.local/bin/uv python install 3.12 &&
      mkdir -p moc_jax && tar xzf moc_jax.tar.gz -C moc_jax && cd moc_jax &&
      make setup ACCELERATOR=tpu PYTHON=\$(~/.local/bin/uv python find 3.12) &&
      .venv/bin/python -m pip install --quiet --editable '.[gcs]'"
    ;;
  mount)
    everywhere "sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/shared && sudo mount $SHARE /mnt/shared"
    ;;
  prepare) # all hosts share the work; what is complete is kept, so the same command resumes
    in_background prepare "moc-prepare --config $CONFIG --data.source $DATA --data.cache $CACHE"
    ;;
  start)
    in_background train "moc-train --config $CONFIG --data.source $DATA --data.cache $CACHE --workdir $WORKDIR \
      --compilation-cache $PROGRAMS $MORE"
    ;;
  logs) # of process 0, or of WORKER=3
    WORKER=${WORKER:-0} everywhere "tail -n 100 -F ~/${2:-train}.log"
    ;;
  stop) # all processes save together and end
    everywhere "kill -TERM \$(cat ~/${2:-train}.pid) && while kill -0 \$(cat ~/${2:-train}.pid) 2>/dev/null; do sleep 1; done"
    ;;
  check) # the results are printed by host 0 and lie there in pod_check.json
    everywhere "cd moc_jax && . .venv/bin/activate &&
      python -m benchmarks.pod_check --workdir $WORKDIR-check --out ~/pod_check.json"
    ;;
  delete)
    gcloud compute tpus tpu-vm delete "$TPU" --zone "$ZONE" --quiet
    ;;
  *)
    sed -n '2,4p' "$0" >&2
    exit 2
    ;;
esac
