-- Store a new job, its ledger entry and its message, or nothing.
-- KEYS[1] job hash   KEYS[2] ledger of its queue (sorted set, score = created_at)
-- KEYS[3] idempotency key (string "id fingerprint"), or the job hash again when none was given
-- KEYS[4] the broker's list of its queue
-- ARGV    prefix, id, now, max_open, queue, fingerprint, idempotency ttl, message, when the job may start ('' for
--         at once), then the hash's field, value, ...
-- Returns {'created'} | {'replayed', id} | {'mismatch', id} | {'full', count}
local prefix, id, now, max_open, queue = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
-- The caller's connection was cut before it had the answer, and it asks again.
if redis.call('EXISTS', KEYS[1]) == 1 then return {'created'} end
local has_key = KEYS[3] ~= KEYS[1]
if has_key then
  local earlier = redis.call('GET', KEYS[3])
  if earlier then
    local earlier_id, fingerprint = string.match(earlier, '^(%S+) (%S*)$')
    return {fingerprint == ARGV[6] and 'replayed' or 'mismatch', earlier_id}
  end
end
local count = redis.call('ZCARD', KEYS[2])
if count >= max_open then return {'full', count} end
-- First, for a script that fails is not undone: what the server may refuse (no room, no right) comes before the rest.
if ARGV[9] == '' then redis.call('LPUSH', KEYS[4], ARGV[8]) end
redis.call('HSET', KEYS[1], unpack(ARGV, 10))
if ARGV[9] ~= '' then postpone(prefix, KEYS[1], id, ARGV[9], ARGV[8]) end
redis.call('ZADD', KEYS[2], now, id)
redis.call('SADD', prefix .. 'queues', queue)
local expires_at = field(KEYS[1], 'expires_at')
if expires_at ~= '' then redis.call('ZADD', prefix .. 'deadlines', expires_at, id) end
if has_key then redis.call('SET', KEYS[3], id .. ' ' .. ARGV[6], 'EX', ARGV[7]) end
return {'created'}
