-- Cancel: at once when queued, by telling the worker when it is running.
-- KEYS[1] job hash   ARGV prefix, id, now, ttl   Returns cancelled | cancelling | final | missing
local prefix, id, now, ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local state = field(KEYS[1], 'state')
if state == '' then return 'missing' end
if FINAL[state] then return 'final' end
if state == 'queued' then
  finish(prefix, KEYS[1], id, 'cancelled', now, ttl)
  return 'cancelled'
end
if state == 'in_progress' then
  redis.call('HSET', KEYS[1], 'state', 'cancelling', 'cancelling_at', now)
  local stream = prefix .. 'cancels:' .. field(KEYS[1], 'worker')
  redis.call('XADD', stream, 'MAXLEN', '~', 10000, '*', 'id', id)
  redis.call('EXPIRE', stream, 3600)
  notify(prefix, KEYS[1], id, 'cancelling')
end
return 'cancelling'
