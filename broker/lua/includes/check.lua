--- @include lifecycle
-- Asks the lifecycle table with a state that was read. Returns the next state, or nil and the refusal.
local function follow(state, event, job)
  if not state then return nil, redis.error_reply("NOJOB " .. job) end
  local to = TRANSITIONS[state] and TRANSITIONS[state][event]
  if to then return to end
  if ENDED[state] then return nil, redis.error_reply("ENDED " .. state) end
  return nil, redis.error_reply("BADTRANSITION " .. state .. " " .. event)
end
local function check(job, event) return follow(redis.call("HGET", job, "state"), event, job) end
-- Refuses whoever is not the present holder of the job: an older attempt, or one that lost it.
local function holds(state, attempt, claimed, job)
  if not state then return redis.error_reply("NOJOB " .. job) end
  if ENDED[state] then return redis.error_reply("ENDED " .. state) end
  if (state ~= "claimed" and state ~= "streaming") or attempt ~= claimed then
    return redis.error_reply("STALE attempt " .. claimed .. ", job is " .. state .. " at " .. attempt)
  end
end
local function fence(job, claimed)
  local f = redis.call("HMGET", job, "state", "attempt")
  return holds(f[1], f[2], claimed, job)
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
