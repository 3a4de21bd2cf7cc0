--- @include lifecycle
-- Asks the lifecycle table. Returns the next state, or nil and the refusal.
local function check(job, event)
  local state = redis.call("HGET", job, "state")
  if not state then return nil, redis.error_reply("NOJOB " .. job) end
  local to = TRANSITIONS[state] and TRANSITIONS[state][event]
  if to then return to end
  if ENDED[state] then return nil, redis.error_reply("ENDED " .. state) end
  return nil, redis.error_reply("BADTRANSITION " .. state .. " " .. event)
end
-- Refuses whoever is not the present holder of the job: an older attempt, or one that lost it.
local function fence(job, attempt)
  local f = redis.call("HMGET", job, "state", "attempt")
  if not f[1] then return redis.error_reply("NOJOB " .. job) end
  if ENDED[f[1]] then return redis.error_reply("ENDED " .. f[1]) end
  if (f[1] ~= "claimed" and f[1] ~= "streaming") or f[2] ~= attempt then
    return redis.error_reply("STALE attempt " .. attempt .. ", job is " .. f[1] .. " at " .. f[2])
  end
end
-- Refuses a caller whose picture of where the job waits is old.
local function placed(job, lane, entry)
  local f = redis.call("HMGET", job, "lane", "entry")
  if f[1] ~= lane or f[2] ~= entry then
    return redis.error_reply("MOVED " .. tostring(f[1]) .. " " .. tostring(f[2]))
  end
end
-- Refuses a decision taken under another policy than the active one.
local function same_policy(policy, version)
  local active = redis.call("HGET", policy, "version") or "0"
  if active ~= version then return redis.error_reply("STALEPOLICY " .. active) end
end
