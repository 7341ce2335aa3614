-- Enter one popped message among the held ones, and pop and enter up to so many others with it.
-- KEYS[1] kombu's hash of held messages   KEYS[2] its index (sorted set, score = time)   KEYS[3...] queue lists
-- ARGV    now, tag of the popped message, its entry, how many more, then the queue of each list
-- Returns {queue, message, queue, message, ...} of the others. A list is popped at its right end, where kombu pops;
-- lists take turns, so that none starves.
local now, limit = ARGV[1], tonumber(ARGV[4])
local taken = {}

local function enter(tag, entry)
  redis.call('ZADD', KEYS[2], now, tag)
  redis.call('HSET', KEYS[1], tag, entry)
end

enter(ARGV[2], ARGV[3])
local found = true
while found and limit > 0 do
  found = false
  for index = 3, #KEYS do
    local raw = limit > 0 and redis.call('RPOP', KEYS[index])
    if raw then
      local properties = cjson.decode(raw).properties
      local info = properties.delivery_info
      enter(properties.delivery_tag, '[' .. raw .. ',' .. cjson.encode(info.exchange) .. ','
            .. cjson.encode(info.routing_key) .. ']')
      taken[#taken + 1] = ARGV[2 + index]
      taken[#taken + 1] = raw
      found, limit = true, limit - 1
    end
  end
end
return taken
