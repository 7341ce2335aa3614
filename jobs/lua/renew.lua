-- KEYS[1] job hash   ARGV token, lease_expires_at   Returns renewed | cancelling | lost
if field(KEYS[1], 'lease_token') ~= ARGV[1] then return 'lost' end
redis.call('HSET', KEYS[1], 'lease_expires_at', ARGV[2])
return field(KEYS[1], 'state') == 'cancelling' and 'cancelling' or 'renewed'
