#!/usr/bin/env bash
# All tests, in two processes side by side: those of several processes, which mostly wait, and beside them, with what they leave of the
# processors (nice), all others. Neither sees the other: every test has directories, ports and namespaces of its own.
# Arguments go to both: scripts/test.sh -k umount
set -uo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
nice -n 5 .venv/bin/python -m pytest -m "not e2e" "$@" >"$log" 2>&1 &
others=$!
trap 'kill $others 2>/dev/null; rm -f "$log"' EXIT
.venv/bin/python -m pytest -m e2e "$@"
several=$?
wait $others
rest=$?
echo "=== tests of one process ==="
cat "$log"
# 5: of the tests asked for, none was of this kind.
[ $several = 5 ] && [ $rest != 5 ] && several=0
[ $rest = 5 ] && rest=0
exit $((several ? several : rest))
