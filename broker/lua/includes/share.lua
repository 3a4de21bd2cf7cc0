--- @include room
--- @include places
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
-- Why a caller gets no place in a lane now: it is full, or others want places and it holds its share of them. nil = it gets
-- one. Who asks is noted where it gets none; KEYS[hosts_from ..] are those of `bound_of`.
local function no_place(key, group, max_queue, root, lane, caller, now, hosts_from, hosts_to, lanes_from, lanes_to)
  local waits, shared_by, own = waiting(key, group), sharers(root, lane, caller, now), waiting_of(root, lane, caller)
  local has_share = shared_by > 1 and own >= math.max(1, math.floor(max_queue / shared_by))
  if waits < max_queue and not has_share then return nil end
  local bound = bound_of(group, max_queue, hosts_from, hosts_to, lanes_from, lanes_to)
  local share = math.max(1, math.floor(bound / shared_by))
  if waits < bound and (shared_by == 1 or own < share) then return nil end
  note_active(root, lane, caller, now)
  if waits >= bound then return redis.error_reply("LANEFULL " .. key) end
  return redis.error_reply("CALLERSHARE " .. own .. " of your jobs wait here, your share while " .. shared_by
    .. " callers want places is " .. share)
end
