-- Give a job back to the queue, at once or when its time comes.
-- KEYS[1] job hash   ARGV prefix, id, token, now, ttl, failure JSON ('' leaves the attempt uncounted),
--         the most attempts that may be forgiven ('' to count this one), when the next attempt may begin
--         ('' for at once), delivery tag of the broker's message ('' where there is none)
-- Returns settled | waiting | cancelled | lost | missing
-- The message is the caller's to requeue when settled; when waiting it has gone from the broker.
local prefix, id, now, ttl, failure = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6]
local next_attempt_at, tag = ARGV[8], ARGV[9]
local job = KEYS[1]
local current = field(job, 'state')

-- The held message as it will be delivered again. kombu keeps '[message, "exchange", "routing key"]'; the
-- message is changed as text, for cjson would round its numbers.
local function take_message()
  local entry = redis.call('HGET', prefix .. 'celery:unacked', tag)
  redis.call('ZREM', prefix .. 'celery:unacked_index', tag)
  redis.call('HDEL', prefix .. 'celery:unacked', tag)
  local message = entry and string.match(entry, '^%[(.*),%s*"[^"]*",%s*"[^"]*"%]$')
  return message and string.gsub(message, '"delivery_info":%s*{', '%0"redelivered": true, ', 1) or ''
end

if current == '' then return 'missing' end
if FINAL[current] then return field(job, 'ended_by') == ARGV[3] and current == 'cancelled' and current or 'lost' end
if field(job, 'lease_token') ~= ARGV[3] then return 'lost' end
if current == 'cancelling' then
  redis.call('HSET', job, 'ended_by', ARGV[3])
  finish(prefix, job, id, 'cancelled', now, ttl)
  return 'cancelled'
end
if failure == '' then
  redis.call('HINCRBY', job, 'attempts', -1)
else
  redis.call('HSET', job, 'failure', failure)
  if ARGV[7] ~= '' then forgive(job, ARGV[7]) end
end
redis.call('HSET', job, 'state', 'queued', 'released_at', now)
redis.call('HDEL', job, 'lease_token', 'lease_expires_at', 'worker')
notify(prefix, job, id, 'queued')
-- Without an attempt left nothing is worth waiting for: the next claim ends the job.
local attempts_left = tonumber(field(job, 'max_attempts')) - tonumber(field(job, 'attempts')) + forgiven(job)
if next_attempt_at == '' or attempts_left <= 0 then return 'settled' end
postpone(prefix, job, id, next_attempt_at, take_message())
return 'waiting'
