-- Undo a creation whose message could not be published.
-- KEYS[1] job hash   ARGV prefix, id   Returns 1 when removed, 0 when a worker had it already
local prefix, id = ARGV[1], ARGV[2]
if field(KEYS[1], 'state') ~= 'queued' or field(KEYS[1], 'attempts') ~= '0' then return 0 end
redis.call('ZREM', prefix .. 'open:' .. field(KEYS[1], 'queue'), id)
local idempotency = field(KEYS[1], 'idempotency_key')
if idempotency ~= '' then redis.call('DEL', prefix .. 'idempotency:' .. idempotency) end
redis.call('ZREM', prefix .. 'deadlines', id)
redis.call('DEL', KEYS[1], prefix .. 'items:' .. id)
return 1
