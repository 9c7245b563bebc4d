#!/usr/bin/env bash
# launch/until_done.sh COMMAND: runs it; exits with 1 where it was stopped before its end, for schedulers that restart then.
#
# moc-train exits with 0 in either case, and says which it was. Signals reach the command.
set -uo pipefail
said=$(mktemp)
"$@" > "$said" 2>&1 &
run=$!
tail -n +1 -f --pid="$run" "$said" &
shown=$!
trap 'kill -TERM "$run"' TERM INT
while :; do
  wait "$run"
  code=$?
  kill -0 "$run" 2>/dev/null || break # else the signal has ended the wait, not the run
done
wait "$shown"
if ((code == 0)) && grep -q "the same command resumes from here" "$said"; then
  exit 1
fi
exit "$code"
