-- Add a replica to the job's watchers and return the state at that moment, as one act.
-- KEYS[1] job hash   ARGV replica   Returns the state, or false
local state = redis.call('HGET', KEYS[1], 'state')
if not state or FINAL[state] then return state end
local watchers = field(KEYS[1], 'watchers')
if not string.find(' ' .. watchers .. ' ', ' ' .. ARGV[1] .. ' ', 1, true) then
  redis.call('HSET', KEYS[1], 'watchers', watchers == '' and ARGV[1] or watchers .. ' ' .. ARGV[1])
end
return state
