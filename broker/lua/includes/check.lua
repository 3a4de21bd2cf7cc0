--- @include lifecycle
-- Asks the lifecycle table with a state that was read. Returns the next state, or nil and the refusal.
local function follow(state, event, job)
  if not state then return nil, redis.error_reply("NOJOB " .. job) end
  local to = TRANSITIONS[state] and TRANSITIONS[state][event]
  if to then return to end
  if ENDED[state] then return nil, redis.error_reply("ENDED " .. state) end
  return nil, redis.error_reply("BADTRANSITION " .. state .. " " .. event)
end
-- Refuses whoever is not the present holder of the job: an older attempt, or one that lost it.
local function holds(state, attempt, claimed, job)
  if not state then return redis.error_reply("NOJOB " .. job) end
  if ENDED[state] then return redis.error_reply("ENDED " .. state) end
  if (state ~= "claimed" and state ~= "streaming") or attempt ~= claimed then
    return redis.error_reply("STALE attempt " .. claimed .. ", job is " .. state .. " at " .. attempt)
  end
end
-- Refuses a caller whose picture of where the job waits is old.
local function placed(lane, entry, lane_seen, entry_seen)
  if lane ~= lane_seen or entry ~= entry_seen then
    return redis.error_reply("MOVED " .. tostring(lane) .. " " .. tostring(entry))
  end
end
-- Refuses a decision taken under another policy than the active one.
local function same_policy(policy, version)
  local active = redis.call("HGET", policy, "version") or "0"
  if active ~= version then return redis.error_reply("STALEPOLICY " .. active) end
end
