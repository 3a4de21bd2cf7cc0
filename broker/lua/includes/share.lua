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
-- Who found no place in a lane and has none there is in line for the next that is free: `line:<lane>` has caller -> since
-- when. It keeps its turn for as long as it may have been told to stay away (`Retry-After` is 30 s at most).
local LINE_MS = 31000
local function stays_in_line(root, lane, caller, now)
  local asked = tonumber(redis.call("ZSCORE", root .. "active:" .. lane, caller) or 0)
  return asked > now - LINE_MS
    and redis.call("ZLEXCOUNT", root .. "waits:" .. caller, "[" .. lane .. "/", "(" .. lane .. "0") == 0
end
local function in_line_before(root, lane, caller, now)
  local before = 0
  for _, other in ipairs(redis.call("ZRANGE", root .. "line:" .. lane, 0, -1)) do
    local stays = stays_in_line(root, lane, other, now)
    if other == caller and stays then break end
    if other ~= caller and stays then before = before + 1 end
  end
  return before
end
local function line_up(root, lane, caller, now)
  local key = root .. "line:" .. lane
  for _, other in ipairs(redis.call("ZRANGE", key, 0, -1)) do
    if not stays_in_line(root, lane, other, now) then redis.call("ZREM", key, other) end
  end
  redis.call("ZADD", key, "NX", ms(now), caller)
  redis.call("PEXPIRE", key, ms(LINE_MS))
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
local function leave_line(root, lane, caller) redis.call("ZREM", root .. "line:" .. lane, caller) end
-- Notes that a caller has got a place.
local function note_place(root, lane, caller, now)
  note_active(root, lane, caller, now)
  leave_line(root, lane, caller)
end
-- Why a caller gets no place in a lane now: it is full, others want places and it holds its share of them, or, where no
-- slot is free, the next places are those of callers in line. Returns the refusal and how many places it holds there, or
-- nil where it gets one. Leaves no mark. `priority` and `max_running` are those of the job that is to wait there, and
-- KEYS[hosts_from ..] those of `bound_of`.
local function in_its_way(key, group, max_queue, root, lane, caller, now, priority, max_running, ...)
  local waits, shared_by, own = waiting(key, group), sharers(root, lane, caller, now), waiting_of(root, lane, caller)
  local has_share = shared_by > 1 and own >= math.max(1, math.floor(max_queue / shared_by))
  local before = in_line_before(root, lane, caller, now)
  if waits < max_queue and not has_share and max_queue - waits > before then return nil end
  local most = may_start(root, caller, tonumber(max_running or 0))
  local bound = bound_of(group, max_queue, priority == "batch", most, ...)
  local share = math.max(1, math.floor(bound / shared_by))
  if waits < bound and shared_by > 1 and own >= share then
    return "CALLERSHARE " .. own .. " of your jobs wait here, your share while " .. shared_by
      .. " callers want places is " .. share, own
  end
  if waits < bound and (waits < bound - max_queue or bound - waits > before) then return nil end
  return "LANEFULL " .. key .. " " .. before, own
end
-- The same for a caller that asks for the place itself: it is noted where it gets none, and lines up if it has none.
local function no_place(key, group, max_queue, root, lane, caller, now, ...)
  local refusal, own = in_its_way(key, group, max_queue, root, lane, caller, now, ...)
  if not refusal then return nil end
  if own == 0 then line_up(root, lane, caller, now) end
  note_active(root, lane, caller, now)
  return redis.error_reply(refusal)
end
