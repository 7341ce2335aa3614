-- Take the lease on a job, or end it, or say why neither.
-- KEYS[1] job hash
-- ARGV    prefix, id, token, worker, now, lease_expires_at, ttl, failure JSON for used-up attempts,
--         traceparent of this attempt ('' for none), the most attempts that may be forgiven
-- Returns {'claimed', attempts, request, queued_at, expires_at, traceparent, previous_traceparent, lost_since,
--          released_at, forgiven, published_at, {index, item, ...} as stored by attempts before}
--       | {'missing'} | {'held'} | {'waiting'}
--       | {'final', attempts, lost_since, state, released_at, in_queue, published_at}
--       | {'cancelled' | 'expired', attempts, lost_since, '', released_at, in_queue, published_at}
--       | {'exhausted', attempts, lost_since, state, released_at, in_queue, published_at}
-- lost_since is when the attempt before began, if it ended without a word: its lease ran out. Else ''.
-- published_at is when the job's last wait for its time was over, '' for one that never waited.
-- in_queue is '1' for a job that ended while it waited in its queue, '' for one that was at work.
local prefix, id, token, worker, now = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local job = KEYS[1]
local state = field(job, 'state')

local function claimed()
  local items = field(job, 'items_completed') == '' and {} or redis.call('HGETALL', prefix .. 'items:' .. id)
  return {'claimed', field(job, 'attempts'), field(job, 'request'), field(job, 'queued_at'),
          field(job, 'expires_at'), field(job, 'traceparent'), field(job, 'previous_traceparent'),
          field(job, 'lost_since'), field(job, 'released_at'), field(job, 'forgiven'), field(job, 'published_at'),
          items}
end

local function ended(outcome, lost_since, final_state)
  local released_at, claimed_at = field(job, 'released_at'), field(job, 'in_progress_at')
  local in_queue = claimed_at == '' or released_at ~= '' and tonumber(released_at) >= tonumber(claimed_at)
  return {outcome, field(job, 'attempts'), lost_since, final_state, released_at, in_queue and '1' or '',
          field(job, 'published_at')}
end

if state == '' then return {'missing'} end
if FINAL[state] then
  -- Once: of an attempt that vanished before the deadline ended its job, whoever comes first tells.
  local vanished_since = field(job, 'vanished_since')
  redis.call('HDEL', job, 'vanished_since')
  return ended('final', vanished_since, state)
end
-- A message too many; the job's own comes when its time does.
if field(job, 'next_attempt_at') ~= '' then return {'waiting'} end
if state ~= 'queued' then
  if field(job, 'lease_token') == token then return claimed() end
  if tonumber(field(job, 'lease_expires_at')) > tonumber(now) then return {'held'} end
end
local attempts = field(job, 'attempts')
local lost_since = state == 'queued' and '' or field(job, 'in_progress_at')
if state == 'cancelling' then
  finish(prefix, job, id, 'cancelled', now, ARGV[7])
  return ended('cancelled', lost_since, '')
end
-- An attempt that vanished while others were in its engine proves nothing against the job.
if lost_since ~= '' and field(job, 'alone') == '' then forgive(job, ARGV[10]) end
local expires_at = tonumber(field(job, 'expires_at'))
if expires_at and expires_at <= tonumber(now) then
  finish(prefix, job, id, 'expired', now, ARGV[7])
  return ended('expired', lost_since, '')
end
if tonumber(attempts) - forgiven(job) >= tonumber(field(job, 'max_attempts')) then
  -- A worker that vanished left no failure of its own; one that reported did, at its release.
  if field(job, 'failure') == '' then redis.call('HSET', job, 'failure', ARGV[8]) end
  return ended('exhausted', lost_since, finish(prefix, job, id, 'failed', now, ARGV[7]))
end
redis.call('HINCRBY', job, 'attempts', 1)
-- Kept, not only returned: a claim that is repeated must say the same again.
redis.call('HSET', job, 'previous_traceparent', field(job, 'attempt_traceparent'), 'lost_since', lost_since,
           'attempt_traceparent', ARGV[9])
redis.call('HSET', job, 'state', 'in_progress', 'in_progress_at', now, 'worker', worker,
           'lease_token', token, 'lease_expires_at', ARGV[6])
redis.call('HDEL', job, 'failure', 'alone')
notify(prefix, job, id, 'in_progress')
return claimed()
