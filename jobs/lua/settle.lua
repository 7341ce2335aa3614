-- The final word of an attempt. The first final state wins.
-- KEYS[1] job hash
-- ARGV    prefix, id, token, now, state, ttl, then field, value, ... (result, usage, timings, failure)
-- Returns settled | cancelled | duplicate | lost | missing
local prefix, id, now, state, ttl = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6]
local current = field(KEYS[1], 'state')
if current == '' then return 'missing' end
if FINAL[current] then return 'duplicate' end
if field(KEYS[1], 'lease_token') ~= ARGV[3] then return 'lost' end
if current == 'cancelling' then
  finish(prefix, KEYS[1], id, 'cancelled', now, ttl)
  return state == 'cancelled' and 'settled' or 'cancelled'
end
if #ARGV > 6 then redis.call('HSET', KEYS[1], unpack(ARGV, 7)) end
finish(prefix, KEYS[1], id, state, now, ttl)
return 'settled'
