-- Do what is due: end jobs past their deadline that no worker holds, publish jobs whose wait is over.
-- KEYS[1] deadlines   KEYS[2] due (sorted sets of job ids by time)   ARGV prefix, now, ttl, the most jobs of each
-- Returns {number ended, number published}
-- Any process may run it, and as many as like: what one has done is no longer due.
local prefix, now, ttl, limit = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local num_ended, num_published = 0, 0

for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, limit)) do
  local job = prefix .. 'job:' .. id
  local state, lease_expires_at = field(job, 'state'), field(job, 'lease_expires_at')
  if state == '' or FINAL[state] then
    redis.call('ZREM', KEYS[1], id)
  elseif lease_expires_at ~= '' and tonumber(lease_expires_at) > tonumber(now) then
    -- Its worker keeps the deadline; looked at again should that one have died.
    redis.call('ZADD', KEYS[1], lease_expires_at, id)
  else
    if lease_expires_at ~= '' then redis.call('HSET', job, 'vanished_since', field(job, 'in_progress_at')) end
    finish(prefix, job, id, state == 'cancelling' and 'cancelled' or 'expired', now, ttl)
    num_ended = num_ended + 1
  end
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, limit)) do
  publish(prefix, prefix .. 'job:' .. id, id, now)
  num_published = num_published + 1
end
return {num_ended, num_published}
