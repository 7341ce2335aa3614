-- Note that the attempt has its engine to itself from now on.
-- KEYS[1] job hash   ARGV token   Returns 1, or 0 when the lease is another's
if field(KEYS[1], 'lease_token') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'alone', '1')
return 1
