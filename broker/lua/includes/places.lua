-- The places that a caller holds: `waits:<caller>` has a member `<lane>/<id>` for each of its jobs that waits, and
-- `@<lane>/<start>/<id>` for one that will (all with score 0, so that those of one lane can be counted, and those that will
-- stand in the order of their starts), `runs:<caller>` has id -> the instant of its claim.
-- `root` is what every key begins with.
local function root_of(job, id) return string.sub(job, 1, -#id - 5) end
-- `start` = `not_before` as it stands in the job's hash, for one that starts later.
local function place_in(lane, id, state, start)
  return state == "scheduled" and "@" .. lane .. "/" .. start .. "/" .. id or lane .. "/" .. id
end
local function hold_waiting(root, caller, lane, id, state, start)
  redis.call("ZADD", root .. "waits:" .. caller, "0", place_in(lane, id, state, start))
end
local function hold_running(root, caller, id, now) redis.call("ZADD", root .. "runs:" .. caller, ms(now), id) end
-- How many more jobs of a caller may run, of which its key allows so many at once (0 = any number).
local function may_start(root, caller, max_running)
  return max_running > 0 and max_running - redis.call("ZCARD", root .. "runs:" .. caller) or math.huge
end
local function hold_no_more(root, caller, lane, id, state, start)
  if state == "claimed" or state == "streaming" then redis.call("ZREM", root .. "runs:" .. caller, id)
  else redis.call("ZREM", root .. "waits:" .. caller, place_in(lane, id, state, start)) end
end
-- Whether as many jobs of the caller wait, over all lanes, as may; 0 = no limit. One that starts later does not wait yet.
local function waits_as_may(root, caller, max_waiting)
  local key = root .. "waits:" .. caller
  return max_waiting > 0 and redis.call("ZCARD", key) - redis.call("ZLEXCOUNT", key, "[@", "(A") >= max_waiting
end
-- When the first of a caller's jobs starts that will wait in a lane, where there is one.
local function first_start(root, lane, caller)
  local from, to = "[@" .. lane .. "/", "(@" .. lane .. "0"
  local place = redis.call("ZRANGEBYLEX", root .. "waits:" .. caller, from, to, "LIMIT", 0, 1)[1]
  return tonumber(string.match(place, "/(%d+)/"))
end
