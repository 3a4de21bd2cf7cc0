-- The places that a caller holds: `waits:<caller>` has a member `<lane>/<id>` for each of its jobs that waits, `@<lane>/<id>`
-- for one that will (all with score 0, so that those of one lane can be counted), `runs:<caller>` has id -> the instant of
-- its claim.
-- `root` is what every key begins with.
local function root_of(job, id) return string.sub(job, 1, -#id - 5) end
local function place_in(lane, id, state) return (state == "scheduled" and "@" or "") .. lane .. "/" .. id end
local function hold_waiting(root, caller, lane, id, state)
  redis.call("ZADD", root .. "waits:" .. caller, "0", place_in(lane, id, state))
end
local function hold_running(root, caller, id, now) redis.call("ZADD", root .. "runs:" .. caller, ms(now), id) end
-- How many more jobs of a caller may run, of which its key allows so many at once (0 = any number).
local function may_start(root, caller, max_running)
  return max_running > 0 and max_running - redis.call("ZCARD", root .. "runs:" .. caller) or math.huge
end
local function hold_no_more(root, caller, lane, id, state)
  if state == "claimed" or state == "streaming" then redis.call("ZREM", root .. "runs:" .. caller, id)
  else redis.call("ZREM", root .. "waits:" .. caller, place_in(lane, id, state)) end
end
