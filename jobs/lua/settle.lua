-- The final word of an attempt. The first final state wins.
-- KEYS[1] job hash
-- ARGV    prefix, id, token, now, state, ttl, delivery tag of the broker's message that it came with ('' to leave
--         that to its holder), then field, value, ... (result, usage, timings, failure)
-- Returns settled | cancelled | lost | missing; the same again to an attempt that asks again
local prefix, id, now, state, ttl = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6]
local current = field(KEYS[1], 'state')

-- With the job final its message has served: acknowledged here, it costs no round trip of its own.
local function acknowledge()
  if ARGV[7] == '' then return end
  redis.call('ZREM', prefix .. 'celery:unacked_index', ARGV[7])
  redis.call('HDEL', prefix .. 'celery:unacked', ARGV[7])
end

if current == '' then return 'missing' end
if FINAL[current] then
  if field(KEYS[1], 'ended_by') ~= ARGV[3] then return 'lost' end
  return current == 'cancelled' and state ~= 'cancelled' and 'cancelled' or 'settled'
end
if field(KEYS[1], 'lease_token') ~= ARGV[3] then return 'lost' end
redis.call('HSET', KEYS[1], 'ended_by', ARGV[3])
if current == 'cancelling' then
  finish(prefix, KEYS[1], id, 'cancelled', now, ttl)
  acknowledge()
  return state == 'cancelled' and 'settled' or 'cancelled'
end
if #ARGV > 7 then redis.call('HSET', KEYS[1], unpack(ARGV, 8)) end
finish(prefix, KEYS[1], id, state, now, ttl)
acknowledge()
return 'settled'
