#!/usr/bin/env bash
# All tests, in two processes side by side: those of several processes, which mostly wait, and beside them, with what they leave of the
# processors (nice), those of one process and the calm ones of one node. Neither sees the other: every test has directories, ports
# and namespaces of its own. Arguments go to both: scripts/test.sh -k umount
set -uo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
nice -n 5 .venv/bin/python -m pytest -m "not e2e or calm" "$@" >"$log" 2>&1 &
beside=$!
trap 'kill $beside 2>/dev/null; rm -f "$log"' EXIT
.venv/bin/python -m pytest -m "e2e and not calm" "$@"
first=$?
wait $beside
second=$?
echo "=== what ran beside ==="
cat "$log"
# 5: of the tests asked for, none was of this kind.
[ $first = 5 ] && [ $second != 5 ] && first=0
[ $second = 5 ] && second=0
exit $((first ? first : second))
