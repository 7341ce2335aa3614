-- Store items of a running job as they end, so that the attempt after this one need not run them again.
-- KEYS[1] job hash   KEYS[2] its items (hash: index -> ItemResult as JSON)
-- ARGV    token, completed and failed ones so far, then index, item, index, item, ...
-- Returns 1, or 0 when the lease is another's. Safe to repeat.
if field(KEYS[1], 'lease_token') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], unpack(ARGV, 4))
redis.call('HSET', KEYS[1], 'items_completed', ARGV[2], 'items_failed', ARGV[3])
return 1
