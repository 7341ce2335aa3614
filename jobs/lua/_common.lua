-- Put before every script. Keys are built from the prefix: one Redis or Sentinel, no Cluster.
-- A job is one hash; see jobs/README.md for its fields. Missing fields read as ''.

local FINAL = {completed = true, failed = true, cancelled = true, expired = true}

local function field(job_key, name)
  return redis.call('HGET', job_key, name) or ''
end

local function forgiven(job_key)
  return tonumber(field(job_key, 'forgiven')) or 0
end

-- Let an attempt go uncounted, unless that was done `limit` times: a job must end some day.
local function forgive(job_key, limit)
  if forgiven(job_key) < tonumber(limit) then redis.call('HINCRBY', job_key, 'forgiven', 1) end
end

-- Tell every API replica that watches the job.
local function notify(prefix, job_key, id, state)
  for replica in string.gmatch(field(job_key, 'watchers'), '%S+') do
    local stream = prefix .. 'replies:' .. replica
    redis.call('XADD', stream, 'MAXLEN', '~', 20000, '*', 'id', id, 'state', state)
    redis.call('EXPIRE', stream, 3600)
  end
end

-- Keep a queued job and its message ('' for none) out of the broker's queue until `at`.
local function postpone(prefix, job_key, id, at, message)
  redis.call('HSET', job_key, 'next_attempt_at', at, 'message', message)
  redis.call('ZADD', prefix .. 'due', at, id)
end

-- End that wait: the message goes into the queue, behind all others, or before them if the job was there already.
-- A job that waited without a message is one that the broker has lost, and found as such.
local function publish(prefix, job_key, id, now)
  local message = field(job_key, 'message')
  if message ~= '' then
    redis.call(field(job_key, 'attempts') == '0' and 'LPUSH' or 'RPUSH',
               prefix .. 'celery:' .. field(job_key, 'queue'), message)
  end
  redis.call('ZREM', prefix .. 'due', id)
  redis.call('HDEL', job_key, 'next_attempt_at', 'message')
  redis.call('HSET', job_key, 'published_at', now)
end

-- What is told of the items that had not ended when their job did; a failed job's own failure otherwise.
local UNENDED = {
  cancelled = '{"reason":"cancelled","message":"the job was cancelled before this prompt was done","retryable":true}',
  expired = '{"reason":"expired","message":"the deadline passed before this prompt was done","retryable":true}',
}

-- Make the result of a job of many prompts that ends before all of them did: what was stored of them, and `failure`
-- (JSON) for each other. Returns how many completed.
local function gather(prefix, job_key, id, failure)
  local stored = redis.call('HGETALL', prefix .. 'items:' .. id)
  local total, completed, used = tonumber(field(job_key, 'num_prompts')), 0, {0, 0, 0}
  local parts, unended = {}, '{"failure":' .. failure .. '}'
  for index = 1, total do parts[index] = unended end
  for at = 1, #stored, 2 do
    local item = cjson.decode(stored[at + 1])
    parts[tonumber(stored[at]) + 1] = stored[at + 1]
    if not item.failure then completed = completed + 1 end
    for place, name in ipairs({'prompt_tokens', 'completion_tokens', 'cached_tokens'}) do
      used[place] = used[place] + item.usage[name]
    end
  end
  redis.call('HSET', job_key, 'result', '{"items":[' .. table.concat(parts, ',') .. ']}',
             'usage', string.format('{"prompt_tokens":%d,"completion_tokens":%d,"cached_tokens":%d}', unpack(used)),
             'items_completed', completed, 'items_failed', total - completed)
  return completed
end

-- Make a state final: record, ledger, retention, watchers, at once. Returns the state: a job that fails when some of
-- its items had completed is a completed one.
local function finish(prefix, job_key, id, state, now, ttl)
  -- Who waited for its time is met by a worker all the same, which tells the trace of the wait.
  if field(job_key, 'next_attempt_at') ~= '' then publish(prefix, job_key, id, now) end
  redis.call('ZREM', prefix .. 'deadlines', id)
  local has_items = state ~= 'completed' and field(job_key, 'items_completed') ~= ''
  if has_items and redis.call('HEXISTS', job_key, 'result') == 0 then
    local num_completed = gather(prefix, job_key, id, UNENDED[state] or field(job_key, 'failure'))
    if state == 'failed' and num_completed > 0 then state = 'completed' end
  end
  redis.call('HSET', job_key, 'state', state, 'finished_at', now,
             'result_expires_at', string.format('%.3f', tonumber(now) + tonumber(ttl)))
  redis.call('HDEL', job_key, 'lease_token', 'lease_expires_at', 'worker')
  if state ~= 'failed' then redis.call('HDEL', job_key, 'request') end
  redis.call('DEL', prefix .. 'items:' .. id)
  redis.call('ZREM', prefix .. 'open:' .. field(job_key, 'queue'), id)
  redis.call('EXPIRE', job_key, ttl)
  notify(prefix, job_key, id, state)
  return state
end
