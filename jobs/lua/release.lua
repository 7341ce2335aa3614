-- Give a job back to the queue.
-- KEYS[1] job hash   ARGV prefix, id, token, now, ttl, failure JSON ('' leaves the attempt uncounted),
--         the most attempts that may be forgiven ('' to count this one)
-- Returns settled | cancelled | duplicate | lost | missing
local prefix, id, now, ttl, failure = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6]
local current = field(KEYS[1], 'state')
if current == '' then return 'missing' end
if FINAL[current] then return 'duplicate' end
if field(KEYS[1], 'lease_token') ~= ARGV[3] then return 'lost' end
if current == 'cancelling' then
  finish(prefix, KEYS[1], id, 'cancelled', now, ttl)
  return 'cancelled'
end
if failure == '' then
  redis.call('HINCRBY', KEYS[1], 'attempts', -1)
else
  redis.call('HSET', KEYS[1], 'failure', failure)
  if ARGV[7] ~= '' then forgive(KEYS[1], ARGV[7]) end
end
redis.call('HSET', KEYS[1], 'state', 'queued', 'released_at', now)
redis.call('HDEL', KEYS[1], 'lease_token', 'lease_expires_at', 'worker')
notify(prefix, KEYS[1], id, 'queued')
return 'settled'
