-- Fair shares of a lane: `active:<lane>` has caller -> when it last asked for a place there, got or not. Who has not for a
-- minute wants none.
local WANTS_MS = 60000
local function note_active(root, lane, caller, now)
  local key = root .. "active:" .. lane
  redis.call("ZREMRANGEBYSCORE", key, "-inf", ms(now - WANTS_MS))
  redis.call("ZADD", key, ms(now), caller)
  redis.call("PEXPIRE", key, ms(WANTS_MS))
end
-- How many callers want places of the lane, this one among them.
local function sharers(root, lane, caller, now)
  local key = root .. "active:" .. lane
  local since = ms(now - WANTS_MS)
  local own = tonumber(redis.call("ZSCORE", key, caller) or 0) > now - WANTS_MS
  return redis.call("ZCOUNT", key, "(" .. since, "+inf") + (own and 0 or 1)
end
-- How many jobs of the caller wait in the lane.
local function waiting_of(root, lane, caller)
  return redis.call("ZLEXCOUNT", root .. "waits:" .. caller, "[" .. lane .. "/", "(" .. lane .. "0")
end
