#!/bin/sh
# Submit a job with curl, wait for it, print the completion. Needs a running stack (`make up`) and python3 for the JSON.
#   URL=http://127.0.0.1:8000 MODEL=throughline-tiny sh examples/submit_and_poll.sh "San Francisco is a"
set -eu
url=${URL:-http://127.0.0.1:8000}
model=${MODEL:-throughline-tiny}
prompt=${1:-San Francisco is a}

field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
quoted() { python3 -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$1"; }

# 202: from here on the job will be run, whatever happens to this script.
job=$(curl --fail-with-body --silent --show-error "$url/v1/jobs" \
  --header 'Content-Type: application/json' \
  --data "{\"model\": $(quoted "$model"), \"prompt\": $(quoted "$prompt"), \"max_tokens\": 16}")
id=$(printf '%s' "$job" | field id)
echo "job $id, trace $(printf '%s' "$job" | field trace_id)" >&2

# Each call waits up to 30 s on the server's side, so this polls once or twice, not a hundred times.
while [ "$(printf '%s' "$job" | field done)" != True ]; do
  job=$(curl --fail-with-body --silent --show-error "$url/v1/jobs/$id?wait=30")
done
curl --fail-with-body --silent --show-error "$url/v1/jobs/$id/result" |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["text"])'
